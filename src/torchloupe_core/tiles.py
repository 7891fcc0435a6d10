"""Large images in parts of one size, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_tiles", "places"]

Size = tuple[int, int]


def places(size: Size, tile: Size) -> list[Size]:
    """(top, left) of the fewest tiles that cover an image of a size, evenly spread; they overlap where they must."""
    rows, columns = (_starts(side, part) for side, part in zip(size, tile, strict=True))
    return [(row, column) for row in rows for column in columns]


def in_tiles(ask: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, tile: Size) -> tuple[Tensor, Tensor]:
    """What `ask` gives for images `[n, C, H, W]`, a value each `[n]` and its gradient, asked tile by tile.

    The value is the mean over the tiles, the gradient that of each pixel in its own tile, averaged where tiles overlap:
    no seam is brighter than the rest.
    """
    found = places((images.shape[2], images.shape[3]), tile)
    gradient, counts = torch.zeros_like(images), images.new_zeros(1, 1, *images.shape[2:])
    total = images.new_zeros(len(images))
    for top, left in found:
        part = (slice(None), slice(None), slice(top, top + tile[0]), slice(left, left + tile[1]))
        value, pull = ask(images[part])
        total = total + value / len(found)
        gradient[part] += pull
        counts[part] += 1
    return total, gradient / (counts * len(found))


def _starts(side: int, part: int) -> list[int]:
    count = math.ceil(side / part)
    return [round(index * (side - part) / max(1, count - 1)) for index in range(count)]
