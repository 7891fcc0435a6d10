"""Drawings made of small pictures side by side, each with its label."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core import plots

__all__ = ["INCH", "place", "short", "some", "tiled", "tinted", "title"]

INCH = 100  # pixels
LABEL, GAP, FRAME = 13, 7, 0.8  # pixels above a tile and beside it; the grey around it
LARGER = 1.6  # times the size asked for, before a tile is reduced


def tinted(maps: Tensor, signed: bool, ends: tuple[float, float]) -> Tensor:
    """`[T, 3, h, w]`: maps `[T, h, w]` in their colours."""
    return plots.colours(maps.flatten(0, 1), signed, ends).view(3, *maps.shape).transpose(0, 1)


def tiled(tiles: Tensor, columns: int, size: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Tiles `[T, 3, h, w]` as one picture `[3, H, W]` on white, with room above each, and where each begins (x, y)."""
    tiles = _resized(tiles, size)
    height, width = tiles.shape[2:]
    down, across = height + LABEL + GAP, width + GAP
    picture = torch.ones(3, math.ceil(len(tiles) / columns) * down, columns * across)
    corners = [(1 + across * (n % columns), LABEL + down * (n // columns)) for n in range(len(tiles))]
    for tile, (x, y) in zip(tiles, corners, strict=True):
        picture[:, y - 1 : y + height + 1, x - 1 : x + width + 1] = FRAME
        picture[:, y : y + height, x : x + width] = tile
    return picture, corners


def _resized(tiles: Tensor, size: int) -> Tensor:
    """Small tiles enlarged by a whole factor, so that each weight is a square; large ones reduced."""
    longest = max(tiles.shape[2:])
    if longest > LARGER * size:
        height, width = (max(1, round(one * size / longest)) for one in tiles.shape[2:])
        return F.interpolate(tiles, (height, width), mode="area")
    factor = max(1, round(size / longest))
    return tiles.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def place(
    axes: Any, picture: Tensor, corners: Sequence[tuple[int, int]], labels: Sequence[str], rows: Sequence[str] = ()
) -> None:
    """A picture without axes, a label above each corner, a name before each row."""
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
    axes.set_axis_off()
    axes.set_anchor("NW")
    for (x, y), label in zip(corners, labels, strict=True):
        axes.text(x, y - 2, short(label, 11), fontsize=6, ha="left", va="bottom")
    for name, (x, y) in zip(rows, corners[:: len(corners) // len(rows)] if rows else [], strict=True):
        axes.text(x - 8, y + 6, short(name, 20), fontsize=7, ha="right", va="top")


def title(drawing: Any, lines: Sequence[str]) -> None:
    room = int(drawing.get_figwidth() * 15)  # letters
    text = "\n".join(textwrap.fill(line, room) for line in lines)
    drawing.suptitle(plots.escaped(text), fontsize=8.5, x=0.01, ha="left")


def short(text: str, most: int) -> str:
    return plots.escaped(text if len(text) <= most else text[: most - 1] + "…")


def some(shown: int, of: int) -> str:
    return str(of) if shown == of else f"{shown} of {of}"
