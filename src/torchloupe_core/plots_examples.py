"""The drawing of examples: one row for each unit, its patches from left to right by activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core import mosaic, plots
from torchloupe_core.examples import Examples

__all__: list[str] = []

TILE, MOST_ROWS = 96, 12  # pixels across a tile; rows
NAMES = 130  # pixels for the names of units
RING = 4  # pixels, the radius of a mark

WORDS = {
    "max": "largest first",
    "min": "smallest first",
    "middle": "around the median, largest first",
    "spectrum": "from the smallest to the largest",
}


@plots.draw.register
def _draw_examples(
    found: Examples, new_figure: Callable[..., Any], *, most: int = MOST_ROWS, columns: int | None = None
) -> tuple[Any, Any]:
    """A tile for each crop under its score; those of a row keep their proportions to one another."""
    rows = min(len(found), most)
    shown = found.only(range(rows))
    width = min(found.indices.shape[1], columns or found.indices.shape[1])
    cells = [_row(crops[:width], shown, row) for row, crops in enumerate(shown.crops)]
    picture, corners = mosaic.tiled(torch.cat([tiles for tiles, _ in cells]), width, TILE)
    height, across = picture.shape[1:]
    size = (max(across, 380) + NAMES + 20, height + 80 + 14 * bool(found.bands))
    drawing = new_figure(figsize=[one / mosaic.INCH for one in size], layout="constrained")
    axes = drawing.subplots()
    scores = [f"{score + 0:.3g}" for score in shown.scores[:, :width].flatten().tolist()]
    empty = (shown.indices[:, :width] < 0).flatten().tolist()
    labels = ["" if nothing else score for score, nothing in zip(scores, empty, strict=True)]
    mosaic.place(axes, picture, corners, labels, shown.units)
    for place, (x, y) in enumerate(corners):
        row, column = divmod(place, width)
        if shown.indices[row, column] >= 0:
            _mark(axes, shown, row, column, (x, y), cells[row][1])
    for column, name in enumerate(found.bands[:width]):
        if column == 0 or found.bands[column - 1] != name:
            axes.text(corners[column][0], -4, name, fontsize=7, fontweight="bold", ha="left", va="bottom")
    mosaic.title(drawing, _title(found, rows, width))
    return drawing, axes


def _row(crops: list[Tensor | None], found: Examples, row: int) -> tuple[Tensor, float]:
    """`[k, 3, TILE, TILE]`: the crops on white, enlarged alike, and by how much. What the border cut stays away."""
    side = max((max(crop.shape[1:]) for crop in crops if crop is not None), default=1) or 1
    factor = TILE / side
    tiles = torch.ones(len(crops), 3, TILE, TILE)
    for column, crop in enumerate(crops):
        if crop is not None and crop.numel():
            top, left, height, width = _extent(found, row, column, factor)
            mode = "bilinear" if factor < 1 else "nearest"
            scaled = F.interpolate(
                crop[None], (height, width), mode=mode, **({"antialias": True} if factor < 1 else {})
            )
            tiles[column, :, top : top + height, left : left + width] = scaled[0]
    return tiles, factor


def _extent(found: Examples, row: int, column: int, factor: float) -> tuple[int, int, int, int]:
    """Where a crop lies in its tile: against the sides where the image went on."""
    top, left, bottom, right = found.shown[row, column].tolist()
    height, width = (min(TILE, max(1, round(size * factor))) for size in (bottom - top, right - left))
    over, before, under, behind = found.outside[row, column].tolist() if found.crop == "patch" else (0, 0, 0, 0)
    down, across = TILE - height, TILE - width
    return (
        down if over > under else 0 if under > over else down // 2,
        across if before > behind else 0 if behind > before else across // 2,
        height,
        width,
    )


def _mark(axes: Any, found: Examples, row: int, column: int, corner: tuple[int, int], factor: float) -> None:
    """The patch in a whole image, or the position where the patch is the whole image."""
    shown, box, point = found.shown[row, column], found.boxes[row, column], found.points[row, column]
    down, across, _, _ = _extent(found, row, column, factor)
    x, y = corner[0] + across - 0.5, corner[1] + down - 0.5
    whole = found.sizes[row, column].tolist() == (box[2:] - box[:2]).tolist()
    if not whole and found.crop == "image":
        top, left, bottom, right = (box * factor).tolist()
        plots.frame(axes, (x + left, y + top), right - left, bottom - top)
    elif whole and not point.isnan().any():
        middle = ((point - shown[:2]) * factor).tolist()
        plots.ring(axes, (x + middle[1], y + middle[0]), RING)


def _title(found: Examples, rows: int, width: int) -> list[str]:
    what = "receptive fields" if found.crop == "patch" else "images"
    marked = bool((found.points.isfinite()).any()) and found.crop == "image"
    lines = [
        f"{mosaic.some(rows, len(found))} {'unit' if len(found) == 1 else 'units'}, {width} {what} each, "
        f"{WORDS[found.band]}" + ("; where, in yellow" if marked else "")
    ]
    skipped = f"; {len(found.skipped)} could not be read" if found.skipped else ""
    return [*lines, f"{found.images:,} images searched{skipped}; numbers are activations"]
