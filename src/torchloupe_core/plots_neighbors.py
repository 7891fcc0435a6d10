"""Drawings of nearest neighbours: a query on the left, its neighbours beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchloupe_core import mosaic, plots
from torchloupe_core.errors import BadInput
from torchloupe_core.neighbors import Neighbors

__all__: list[str] = []

DPI = 100
LEFT = 8  # pixels before the queries
MOST_ROWS, MOST_COLUMNS = 12, 10
SIZE, GAP, LABEL, TITLE, APART = 72, 8, 26, 58, 26  # pixels: a picture, between, below one, above all, between sides
SAME, OTHER, NEUTRAL = (0.10, 0.50, 0.27), (0.70, 0.15, 0.12), (0.80, 0.82, 0.85)


@plots.draw.register
def _draw_neighbors(
    found: Neighbors,
    new_figure: Callable[..., Any],
    *,
    beside: Neighbors | None = None,
    most: int = MOST_ROWS,
    size: int = SIZE,
) -> tuple[Any, Any]:
    """A row for each query: its picture, its neighbours with their distances, and those of another search beside.

    Green are neighbours with the query's label, red those with another. beside: of the same queries, as in pixels.
    """
    sides = [found] if beside is None else [found, beside]
    if beside is not None and not torch.equal(found.query_indices, beside.query_indices):
        raise BadInput("two searches are drawn side by side for the same queries; these have others")
    rows, columns = min(len(found), most), [min(side.k, MOST_COLUMNS) for side in sides]
    step = size + GAP
    across = LEFT + step + sum(APART + count * step for count in columns)
    width, height = max(across, 460), TITLE + rows * (size + LABEL)
    canvas = torch.ones(3, height, width)
    drawing = new_figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = drawing.add_axes((0, 0, 1, 1))
    tops = [TITLE + row * (size + LABEL) for row in range(rows)]
    for row, picture in enumerate(_first(found, rows).query_thumbnails(size)):
        _paste(canvas, picture, tops[row], LEFT, NEUTRAL)
        _say(axes, LEFT, tops[row] + size + 3, _label(found, int(found.query_labels[row])) or found.queries.name(row))
    left = LEFT + step + APART
    for side, count in zip(sides, columns, strict=True):
        _say(axes, left, 28, _heading(side), size=8)
        _neighbors(axes, canvas, _first(side, rows), count, tops, left, size)
        left += count * step + APART
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    _say(axes, LEFT, 6, _title(found, rows), size=8.5)
    return drawing, axes


def _neighbors(axes: Any, canvas: Tensor, shown: Neighbors, count: int, tops: list[int], left: int, size: int) -> None:
    for row, pictures in enumerate(shown.thumbnails(size)):
        for place, picture in enumerate(pictures[:count]):
            x, own, label = left + place * (size + GAP), int(shown.query_labels[row]), int(shown.labels[row, place])
            colour = NEUTRAL if min(own, label) < 0 else SAME if own == label else OTHER
            _paste(canvas, picture, tops[row], x, colour)
            name = _label(shown, label)
            distance = f"{shown.distances[row, place].item():.3g}"
            _say(axes, x, tops[row] + size + 3, f"{distance} {name}" if name else distance)


def _first(found: Neighbors, rows: int) -> Neighbors:
    """The first queries alone, so that no other picture is read."""
    count = rows * found.k
    cut: dict[str, Any] = {
        name: getattr(found, name)[:rows]
        for name in ("indices", "distances", "labels", "query_indices", "query_labels", "query_names", "query_pictures")
        if getattr(found, name) is not None
    }
    cut |= {name: getattr(found, name)[:count] for name in ("names", "pictures") if getattr(found, name) is not None}
    return replace(found, **cut)


def _paste(canvas: Tensor, picture: Tensor, top: int, left: int, colour: tuple[float, float, float]) -> None:
    size = picture.shape[1]
    canvas[:, top - 2 : top + size + 2, left - 2 : left + size + 2] = torch.tensor(colour)[:, None, None]
    canvas[:, top : top + size, left : left + size] = picture / 255


def _say(axes: Any, x: int, y: int, text: str, size: float = 6.0) -> None:
    axes.text(x - 2, y, mosaic.short(text, 15 if size < 7 else 120), fontsize=size, ha="left", va="top")


def _label(found: Neighbors, label: int) -> str:
    if label < 0:
        return ""
    return found.classes[label] if found.classes is not None and label < len(found.classes) else str(label)


def _heading(side: Neighbors) -> str:
    where = f"features at {side.layer}" if side.space == "features" else "pixels"
    recall = side.diagnostics.get("recall")
    return f"{where}, {side.metric}" + ("" if recall is None else f", {recall:.0%} of the true ones")


def _title(found: Neighbors, rows: int) -> str:
    queries = f"{rows} of {len(found)} queries" if rows < len(found) else f"{rows} quer" + ("ies" if rows > 1 else "y")
    return f"{queries}, nearest of {found.diagnostics['images']:,} images"
