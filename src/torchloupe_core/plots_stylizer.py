"""Drawings of a trained stylizer: pictures in every style, and how training went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchloupe_core import plots
from torchloupe_core.making import pictures
from torchloupe_core.stylizer import Stylizer

__all__: list[str] = []

MOST, TILE, CURVE = 8, 1.3, 1.7  # rows; inches


@plots.draw.register
def _draw_stylizer(stylizer: Stylizer, new_figure: Callable[..., Any], *, most: int = MOST) -> tuple[Any, Any]:
    """A row for each style: the style, then pictures of the data set in it, these themselves above; losses below."""
    rows, columns = min(len(stylizer), most) + 1, len(stylizer.samples) + 1
    drawing = new_figure(figsize=(TILE * columns, TILE * rows + CURVE), layout="constrained")
    grid = drawing.add_gridspec(rows + 1, columns, height_ratios=[1.0] * rows + [CURVE / TILE])
    axes = [[drawing.add_subplot(grid[row, column]) for column in range(columns)] for row in range(rows)]
    for one in (one for row in axes for one in row):
        one.set_axis_off()
    for column, image in enumerate(pictures(stylizer.samples)):
        _show(axes[0][column + 1], image)
    for row in range(1, rows):
        _show(axes[row][0], stylizer.pictures[row - 1], stylizer.styles[row - 1][:20])
        for column, image in enumerate(pictures(stylizer.made[row - 1])):
            _show(axes[row][column + 1], image)
    below = drawing.add_subplot(grid[rows, :])
    steps = range(1, len(stylizer.losses) + 1)
    for name, values in zip(("content", "style", "variation"), stylizer.losses.T, strict=True):
        below.plot(steps, values.numpy(), linewidth=0.7, label=name)
    below.set_yscale("log")
    below.set_xlabel(plots.escaped("; ".join(filter(None, ("step", stylizer.stopped)))), fontsize=7)
    below.tick_params(labelsize=6)
    below.spines[["top", "right"]].set_visible(False)
    below.legend(fontsize=6, frameon=False)
    return drawing, axes


def _show(axes: Any, image: Tensor, title: str = "") -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
    if title:
        axes.set_title(plots.escaped(title), fontsize=6.5, loc="left", pad=2)
