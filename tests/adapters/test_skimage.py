"""Superpixels."""

from __future__ import annotations

import pytest
import torch

from torchloupe_adapters.skimage import slic
from torchloupe_core.errors import BadInput


def test_superpixels_follow_the_picture() -> None:
    picture = torch.zeros(3, 32, 48)
    picture[0, :, 24:] = 1  # black and red
    labels = slic(picture, 8)
    assert labels.shape == (32, 48)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
    assert not set(labels[:, :23].unique().tolist()) & set(labels[:, 25:].unique().tolist())
    assert 4 <= len(labels.unique()) <= 16
    assert torch.equal(slic(picture, 8), labels)


@pytest.mark.parametrize("n", [10, 50])
def test_noise_and_flat_pictures_still_come_apart(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for picture in (torch.rand(3, 64, 64, generator=generator), torch.full((3, 64, 64), 0.5)):
        assert n / 2 <= len(slic(picture, n).unique()) <= 2 * n


def test_one_superpixel_is_refused() -> None:
    with pytest.raises(BadInput, match="at least 2"):
        slic(torch.zeros(3, 8, 8), 1)
