"""Drawings of optimised images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchloupe_core import plots
from torchloupe_core.gallery import Gallery
from torchloupe_core.visualization import Visualization

__all__: list[str] = []

MOST, COLUMNS, MOST_ROWS = 40, 8, 12
TILE, LEAST_WIDTH = 1.55, 3.2  # inches
LETTERS = 26  # of a title above a tile


@plots.draw.register
def _draw_visualization(
    made: Visualization,
    new_figure: Callable[..., Any],
    *,
    most: int = MOST,
    columns: int | None = None,
    curve: bool = False,
    alpha: bool | None = None,
) -> tuple[Any, Any]:
    """The images with their targets and values; a row for each where there is what it was made from, or snapshots.

    curve: what was minimised, step by step, below. alpha: pixels that mattered little fade into white; by default where
    the result knows it.
    """
    if _alike(made):
        made = _with_given(made)
    before = _before(made)
    shown = min(len(made), min(most, MOST_ROWS) if before else most)
    fades = made.alpha is not None if alpha is None else alpha
    across = len(before) + 1 if before else columns or _columns(shown)
    down = shown if before else math.ceil(shown / across)
    width, height = max(LEAST_WIDTH, TILE * across), (TILE * made.size[0] / made.size[1] + 0.38) * down
    extra = 1.5 if curve else 0.0
    drawing = new_figure(figsize=(width, height + extra + 0.1), layout="constrained")
    grid = drawing.add_gridspec(
        down + bool(curve), across, height_ratios=[1.0] * down + [extra * down / height] * curve
    )
    axes = [[drawing.add_subplot(grid[row, column]) for column in range(across)] for row in range(down)]
    for one in (one for row in axes for one in row):
        one.set_axis_off()
    for index in range(shown):
        row, column = (index, across - 1) if before else divmod(index, across)
        _show(axes[row][column], _faded(made, index) if fades else made.images[index], _title(made, index))
        for place, (name, images) in enumerate(before):
            _show(axes[index][place], images[index], name)
    if curve:
        _curve(drawing.add_subplot(grid[down, :]), made, shown)
    note = [f"{shown} of {len(made)} images"] if shown < len(made) else []
    if made.stopped:
        note.append(made.stopped)
    if note:
        drawing.supxlabel(plots.escaped("; ".join(note)), fontsize=7)
    return drawing, axes


@plots.draw.register
def _draw_gallery(gallery: Gallery, new_figure: Callable[..., Any], *, most: int = MOST_ROWS) -> tuple[Any, Any]:
    """The pictures in their rows and columns, each with its value."""
    down, across = min(len(gallery), most), len(gallery.columns)
    height = TILE * gallery.images.shape[3] / gallery.images.shape[4] + 0.25
    drawing = new_figure(figsize=(TILE * across + 0.3, height * down + 0.3), layout="constrained")
    axes = drawing.subplots(down, across, squeeze=False)
    for row in range(down):
        for column in range(across):
            one, value = axes[row][column], gallery.values[row, column].item()
            says = "" if math.isnan(value) else f"{value:.3g}"
            _show(one, gallery.images[row, column], f"{gallery.columns[column]}\n{says}" if row == 0 else says)
            one.set_xticks([])
            one.set_yticks([])
            one.spines[:].set_visible(False)
        axes[row][0].set_ylabel(plots.escaped(_short(gallery.rows[row])), fontsize=7)
    return drawing, axes


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def _before(made: Visualization) -> list[tuple[str, Tensor]]:
    """What came before the images, in order."""
    found = [] if made.given is None else [("given", made.given)]
    if made.snapshots is not None:
        found += [(f"step {step}", made.at(step)) for step in made.snapshot_steps]
    return found


def _alike(made: Visualization) -> bool:
    """Whether several images were made from one and the same."""
    given = made.given
    return made.snapshots is None and len(made) > 1 and given is not None and bool((given == given[:1]).all())


def _with_given(made: Visualization) -> Visualization:
    """The same with what was given as the first of the images."""
    blank = torch.full((1, made.losses.shape[1]), float("nan"))
    return replace(
        made,
        images=torch.cat([made.images if made.given is None else made.given[:1], made.images]),
        target=("given", *made.targets),
        scores=torch.cat([torch.full((1,), float("nan")), made.scores]),
        losses=torch.cat([blank, made.losses]),
        alpha=None if made.alpha is None else torch.cat([torch.ones_like(made.alpha[:1]), made.alpha]),
        given=None,
    )


def _columns(count: int) -> int:
    """Few rows, evenly filled."""
    rows = math.ceil(count / COLUMNS)
    return math.ceil(count / rows)


def _show(axes: Any, image: Tensor, title: str) -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest" if image.shape[-1] < 128 else None)
    axes.set_title(plots.escaped(title), fontsize=7, loc="left", pad=3)


def _title(made: Visualization, index: int) -> str:
    value = made.scores[index].item()
    if math.isnan(value):
        return _short(made.targets[index])
    return f"{_short(made.targets[index])}\n{made.diagnostics.get('label', '=')} {value:.3g}"


def _faded(made: Visualization, index: int) -> Tensor:
    opacity = torch.ones(1) if made.alpha is None else made.alpha[index]
    return made.images[index] * opacity + (1 - opacity)


def _curve(axes: Any, made: Visualization, shown: int) -> None:
    steps = range(1, made.losses.shape[1] + 1)
    rows = [index for index in range(shown) if not made.losses[index].isnan().all()]
    for index in rows:
        axes.plot(steps, made.losses[index].numpy(), linewidth=0.8, label=made.targets[index][:LETTERS])
    axes.set_xlabel("step", fontsize=7)
    axes.set_ylabel("loss", fontsize=7)
    axes.tick_params(labelsize=6)
    axes.spines[["top", "right"]].set_visible(False)
    if rows and bool((made.losses[rows].nan_to_num(1.0) > 0).all()):
        axes.set_yscale("log")
    if len(rows) <= COLUMNS:
        axes.legend(fontsize=6, frameon=False)
