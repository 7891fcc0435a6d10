"""What stands in for pixels taken away: against for-loops and torchvision's blur."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import torchloupe as tl
from torchloupe_core.baselines import blurred, filling
from torchloupe_core.errors import BadInput
from torchloupe_core.query import Query

X = torch.randn(2, 3, 10, 12, generator=torch.Generator().manual_seed(1))


def query(inputs: Tensor = X) -> Query:
    handle = tl.wrap(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), input_size=tuple(inputs.shape[1:]))
    return Query(handle, inputs, [])


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (None, torch.zeros(1, 3, 10, 12)),
        (0.5, torch.full((1, 3, 10, 12), 0.5)),
        (2, torch.full((1, 3, 10, 12), 2.0)),
        (torch.tensor([1.0, 2.0, 3.0])[:, None, None], torch.tensor([1.0, 2.0, 3.0])[None, :, None, None]),
        (X[0] * 2, X[:1] * 2),
        (X.double() * 3, X * 3),
    ],
)
def test_numbers_and_tensors_are_taken_as_they_are(baseline: Any, expected: Tensor) -> None:
    found = filling(query(), baseline)
    assert found.dtype == X.dtype
    assert found.shape[1:] == (3, 10, 12)
    torch.testing.assert_close(found, expected.expand_as(found))


def test_mean_is_each_images_own_colour() -> None:
    found = filling(query(), "mean")
    for image, one in zip(X, found, strict=True):
        for channel, filled in zip(image, one, strict=True):
            torch.testing.assert_close(filled, torch.full((10, 12), sum(channel.flatten().tolist()) / 120))


def test_blur_is_the_papers_at_224_pixels() -> None:
    images = torch.rand(1, 3, 224, 240)
    inside = (..., slice(5, -5), slice(5, -5))  # at the edges torchvision reflects, we repeat
    torch.testing.assert_close(blurred(images)[inside], gaussian_blur(images, [11, 11], [5.0, 5.0])[inside])


@pytest.mark.parametrize(("side", "width"), [(16, 3), (100, 5), (224, 11), (448, 21)])
def test_blur_grows_with_the_image(side: int, width: int) -> None:
    point = torch.zeros(1, 1, side, side)
    point[..., side // 2, side // 2] = 1
    reached = blurred(point)[0, 0].nonzero()
    assert (reached.amax(0) - reached.amin(0) + 1).tolist() == [width, width]


def test_blur_leaves_flat_images_and_their_dtype_as_they_are() -> None:
    flat = torch.tensor([0.2, -1.0, 3.0])[None, :, None, None].expand(2, 3, 40, 30)
    torch.testing.assert_close(filling(query(flat), "blur"), flat)
    assert blurred(X.bfloat16()).dtype == torch.bfloat16
    assert blurred(X[:, :1, :1, :1]).shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("gray", "'gray'"),
        (torch.zeros(2, 5, 5), r"\[2, 5, 5\]"),
        (torch.zeros(3, 3, 10, 12), "3 images for 2"),
        (float("nan"), "NaN"),
        (torch.full((3, 10, 12), torch.inf), "infinity"),
        ([object()], "object"),
        ({"blur": 1}, "blur"),
    ],
)
def test_what_fills_nothing_is_refused(baseline: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        filling(query(), baseline)
