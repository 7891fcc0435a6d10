"""GrabCut from an attribution map."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import torchloupe as tl
from torchloupe_core.errors import BadInput, MissingDependency


def attribution(values: Tensor, images: Tensor) -> tl.Attribution:
    return tl.Attribution(
        "grad_cam",
        "native",
        0,
        0.0,
        1,
        {},
        {},
        values=values,
        images=images,
        scores=torch.zeros(len(values)),
        target="0",
    )


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Red squares on blue, a blurred map of where they are, and the truth."""
    truth = torch.zeros(2, 64, 64, dtype=torch.bool)
    truth[0, 10:34, 12:40] = True
    truth[1, 36:60, 30:58] = True
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    images = noise + truth[:, None] * torch.tensor([0.8, 0, 0])[:, None, None]
    images += ~truth[:, None] * torch.tensor([0, 0, 0.8])[:, None, None]
    maps = torch.nn.functional.avg_pool2d(truth[:, None].float(), 8)[:, 0]  # [2, 8, 8], as coarse as a CAM
    return images.clamp(0, 1), maps, truth


def test_the_object_is_cut_out() -> None:
    pytest.importorskip("cv2")
    images, maps, truth = scene()
    found = attribution(maps, images).segment()
    assert found.shape == truth.shape
    assert found.dtype == torch.bool
    overlap = (found & truth).flatten(1).sum(1) / (found | truth).flatten(1).sum(1)
    assert overlap.min() > 0.9
    assert torch.equal(attribution(maps, images).segment(), found)


def test_a_flat_map_is_refused() -> None:
    pytest.importorskip("cv2")
    images, _, _ = scene()
    with pytest.raises(BadInput, match="the same everywhere"):
        attribution(torch.ones(2, 8, 8), images).segment()


def test_without_opencv_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    images, maps, _ = scene()
    with pytest.raises(MissingDependency, match=r'pip install "torchloupe\[segment\]"'):
        attribution(maps, images).segment()
