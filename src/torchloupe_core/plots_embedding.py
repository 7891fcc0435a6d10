"""Drawings of embeddings and even grids: points in colour, small pictures in their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchloupe_core import mosaic, plots
from torchloupe_core.columns import Column, ColumnLike, column, labels_column
from torchloupe_core.embedding import Embedding
from torchloupe_core.errors import BadInput
from torchloupe_core.evengrid import Grid

__all__ = ["PALETTE", "UNKNOWN", "chosen_column", "colours_of"]

KINDS = 20
# Okabe and Ito's eight without black, then others as far from these and from each other as possible.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#b8a800", "#6b4226", "#1b7837",
    "#f781bf", "#4d4d4d", "#00bfc4", "#a6761d", "#8b0000", "#7cae00", "#c77cff", "#2f4b7c", "#ff8a80", "#66c2a5",
)  # fmt: skip
UNKNOWN = "#c4c9d1"
SIDE, PICTURED = 7.0, 10.0  # inches, of points and of pictures
DPI = 100
THUMBNAIL = 32  # pixels across a picture among the points
APART = 0.65  # of that, between the middles of two: at least two fifths of each are seen
FRAME = 2  # pixels of colour around it
TILES = 1500  # pixels at most across a grid of pictures
TITLE, LEAST_WIDTH = 30, 420  # pixels above it, and across so that the title has room


def chosen_column(found: Embedding, by: str | ColumnLike | None) -> Column | None:
    """What to colour by: the labels where there are any ("auto") or must be ("label"), values given, or nothing."""
    if by is None or (isinstance(by, str) and by == "auto" and not found.labelled):
        return None
    if isinstance(by, str):
        if by not in ("auto", "label"):
            raise BadInput(f'by is "label", a value for each of the {len(found)} points, or None; got {by!r}')
        return labels_column(found.labels, found.classes)
    return column("value", by, len(found))


def colours_of(shown: Column | None, count: int) -> Tensor:
    """`[N, 3]` in [0, 1]: a colour for each point; what is unknown is grey, and all are alike without a column."""
    if shown is None:
        return _rgb(PALETTE[0]).expand(count, 3)
    if shown.kinds is not None:
        table = torch.stack([*(_rgb(PALETTE[code % KINDS]) for code in range(len(shown.kinds))), _rgb(UNKNOWN)])
        return table[shown.codes]
    low, high = shown.ends
    known = shown.values.isfinite()
    tints = plots.colours(shown.values.nan_to_num()[None], False, (low, high if high > low else low + 1))[:, 0].T
    return tints.where(known[:, None], _rgb(UNKNOWN))


def _rgb(text: str) -> Tensor:
    return torch.tensor([int(text[start : start + 2], 16) / 255 for start in (1, 3, 5)])


# -- scatter ----------------------------------------------------------------------------------------------------------


@plots.draw.register
def _draw_embedding(
    found: Embedding,
    new_figure: Callable[..., Any],
    *,
    by: str | ColumnLike | None = "auto",
    images: bool = False,
    size: int = THUMBNAIL,
) -> tuple[Any, Any]:
    """A point for each image, coloured by label or a column. images: pictures, as many as do not hide each other.

    size: pixels across a picture.
    """
    shown = chosen_column(found, by)
    shown = None if shown is None else shown.frequent(KINDS)[0]
    if images and found.dims == 3:
        raise BadInput("pictures are drawn in two dimensions; this embedding has 3, ask with dims=2")
    aside = 0.0 if shown is None else 1.6
    side = PICTURED if images else SIDE
    drawing = new_figure(figsize=(side + aside, side + 0.35), dpi=DPI, layout="constrained")
    axes = drawing.add_subplot(projection="3d") if found.dims == 3 else drawing.add_subplot()
    tints = colours_of(shown, len(found))
    _points(axes, found, tints, faint=images)
    _bare(axes, found)
    if shown is not None:
        _legend(drawing, axes, shown)
    drawing.suptitle(f"{_title(found)}\n ", fontsize=8.5, x=0.01, ha="left")  # its room, before places are known
    pictured = _pictures(drawing, axes, found, size, tints) if images else None
    drawing.suptitle(_title(found, pictured), fontsize=8.5, x=0.01, ha="left")
    return drawing, axes


def _points(axes: Any, found: Embedding, tints: Tensor, *, faint: bool) -> None:
    """In an order drawn at random, so that no kind lies on top of another because of its number."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(found.seed)).numpy()
    across = float(np.clip(110 / np.sqrt(len(found)), 1.2, 7.0))  # points, the unit
    axes.scatter(
        *found.points[order].T.numpy(),
        s=(0.5 * across if faint else across) ** 2,
        c=tints[order].numpy(),
        alpha=0.5 if faint else 0.85,
        linewidths=0,
        rasterized=len(found) > 5000,
    )


def _bare(axes: Any, found: Embedding) -> None:
    """Without numbers, which mean nothing here but in principal components."""
    shares = found.diagnostics.get("explained_variance")
    names = [f"component {n + 1}, {share:.0%} of the variance" for n, share in enumerate(shares or [])]
    for name, which in zip(names or [""] * found.dims, "xyz", strict=False):
        getattr(axes, f"set_{which}label")(name, fontsize=8)
        getattr(axes, f"set_{which}ticks")([])
    if found.dims == 2:
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.04)
        for spine in axes.spines.values():
            spine.set_color("#dfe3ea")


def _legend(drawing: Any, axes: Any, shown: Column) -> None:
    if shown.kinds is None:
        plots.colour_bar(drawing, axes, shown.ends, False, aspect=30)
        return
    kinds = [(kind, PALETTE[code % KINDS]) for code, kind in enumerate(shown.kinds)]
    unknown = [("unknown", UNKNOWN)] if bool((shown.codes < 0).any()) else []
    nowhere = [[] for _ in range(3 if axes.name == "3d" else 2)]  # type: list[list[float]]
    marks = [
        axes.scatter(*nowhere, s=28, color=colour, label=mosaic.short(kind, 22)) for kind, colour in [*kinds, *unknown]
    ]
    drawing.legend(handles=marks, loc="outside right upper", fontsize=8, frameon=False)


def _title(found: Embedding, pictured: int | None = None) -> str:
    trust = found.diagnostics.get("trustworthiness")
    said = "" if trust is None else f", trustworthiness {trust:.3f}"
    shown = (
        ""
        if pictured is None or pictured == len(found)
        else f"\npictures of {pictured:,}, as many as do not hide each other"
    )
    return plots.escaped(f"{len(found):,} images at {found.layer}, {found.method}{said}{shown}")


# -- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(drawing: Any, axes: Any, found: Embedding, size: int, tints: Tensor) -> int:
    """Pictures at their points, none far over another, framed in the point's colour; how many there are."""
    drawing.draw_without_rendering()  # or the layout is not known, and so not where pixels are
    box, edge = axes.get_window_extent(), size // 2 + 2
    places = axes.transData.transform(found.points.double().numpy()) - [box.x0, box.y0]
    rows = apart(places, APART * (size + 2 * FRAME), found.seed)
    canvas = torch.zeros(4, round(box.height) + 2 * edge, round(box.width) + 2 * edge)
    for row, picture in zip(rows.tolist(), found.thumbnails(size, rows) / 255, strict=True):
        left = round(places[row, 0]) + edge - size // 2
        top = canvas.shape[1] - edge - round(places[row, 1]) - size // 2
        whole = canvas[:, top - FRAME : top + size + FRAME, left - FRAME : left + size + FRAME]
        whole[:3], whole[3] = tints[row][:, None, None], 1.0
        canvas[:3, top : top + size, left : left + size] = picture
    corners = axes.transData.inverted().transform([(box.x0 - edge, box.y0 - edge), (box.x1 + edge, box.y1 + edge)])
    limits = axes.get_xlim(), axes.get_ylim()
    extent = (corners[0, 0], corners[1, 0], corners[0, 1], corners[1, 1])
    axes.imshow(canvas.permute(1, 2, 0).numpy(), extent=extent, aspect="auto", zorder=3, clip_on=False)
    axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
    return len(rows)


def apart(places: NDArray[np.float64], size: float, seed: int) -> Tensor:
    """Places such that squares of this size around them do not meet; taken in an order drawn at random."""
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    cells: dict[tuple[int, int], list[int]] = {}
    taken = []
    for row in order:
        across, down = (int(one // size) for one in places[row])
        near = [other for i in (-1, 0, 1) for j in (-1, 0, 1) for other in cells.get((across + i, down + j), [])]
        if all(np.abs(places[row] - places[other]).max() >= size for other in near):
            cells.setdefault((across, down), []).append(row)
            taken.append(row)
    return torch.tensor(sorted(taken))


# -- grid -------------------------------------------------------------------------------------------------------------


@plots.draw.register
def _draw_grid(grid: Grid, new_figure: Callable[..., Any], *, size: int | None = None) -> tuple[Any, Any]:
    """The pictures of a grid, each in its cell. size: pixels across a picture."""
    down, across = grid.shape
    size = size or max(8, min(64, TILES // max(down, across)))
    step = size + 1
    picture = torch.full((3, down * step - 1, across * step - 1), 255, dtype=torch.uint8)
    for (row, place), tile in zip(grid.cells.tolist(), grid.thumbnails(size), strict=True):
        picture[:, row * step : row * step + size, place * step : place * step + size] = tile
    height, width = picture.shape[1:]
    whole = (max(width, LEAST_WIDTH), height + TITLE)
    drawing = new_figure(figsize=(whole[0] / DPI, whole[1] / DPI), dpi=DPI)
    axes = drawing.add_axes((0, 0, width / whole[0], height / whole[1]))  # pixel for pixel
    axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    drawing.suptitle(_grid_title(grid), fontsize=8.5, x=6 / whole[0], y=1 - 8 / whole[1], ha="left", va="top")
    return drawing, axes


def _grid_title(grid: Grid) -> str:
    images, of = grid.diagnostics["images"], grid.diagnostics["of"]
    some = f"{images:,} images" if images == of else f"{images:,} of {of:,} images, drawn at random"
    moved = f"moved by {grid.diagnostics['moved']:.0%} of the width"
    return plots.escaped(f"{some}, by {grid.options['embedding']}, {moved}")
