"""Tiles: they cover an image evenly, and what is asked of them adds up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchloupe_core.tiles import in_tiles, places


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (16, 31), (8, 17)])
def test_tiles_cover_the_image_with_as_few_as_can_be(size: tuple[int, int]) -> None:
    found = places(size, (8, 8))
    covered = torch.zeros(size)
    for top, left in found:
        assert 0 <= top <= size[0] - 8 and 0 <= left <= size[1] - 8
        covered[top : top + 8, left : left + 8] += 1
    assert covered.min() == 1 and len(found) == -(-size[0] // 8) * -(-size[1] // 8)
    assert covered.max() <= 4


def test_the_gradient_of_each_pixel_is_that_of_its_tiles() -> None:
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))

    def ask(part: Tensor) -> tuple[Tensor, Tensor]:  # the sum of squares
        return part.square().sum((1, 2, 3)), 2 * part

    value, gradient = in_tiles(ask, images, (4, 4))
    torch.testing.assert_close(value, images.square().sum((1, 2, 3)) / 6)
    torch.testing.assert_close(gradient, 2 * images / 6)
    _, overlapping = in_tiles(ask, images, (8, 7))  # two of them, two columns in common
    torch.testing.assert_close(overlapping, 2 * images / 2)
    whole = in_tiles(ask, images, (8, 12))
    torch.testing.assert_close(whole[1], 2 * images)
