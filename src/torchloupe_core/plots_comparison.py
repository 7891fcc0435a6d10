"""Drawings of a comparison: maps side by side, means with their intervals, cost against faithfulness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torchloupe_core import plots
from torchloupe_core.comparison import Comparison
from torchloupe_core.errors import BadInput

__all__: list[str] = []

Kind = Literal["maps", "bars", "cost", "agreement"]

TILE = 1.3  # inches
METHOD, FLOOR = "#3465a4", "#b5b9c0"
MEASURES = ("rank correlation", "overlap of the highest tenth", "structural similarity")


@plots.draw.register
def _draw_comparison(
    found: Comparison, new_figure: Callable[..., Any], *, kind: Kind = "bars", metrics: Sequence[str] | None = None
) -> tuple[Any, Any]:
    """kind: "bars", the means with their intervals; "maps", the first images by every method; "cost", the mean rank
    against the time for an image; "agreement", how alike methods are, pair by pair. metrics: some of them."""
    chosen = [name for name in found.metrics if metrics is None or name in metrics]
    if kind == "maps":
        return _maps(found, new_figure)
    if kind == "bars":
        return _bars(found, new_figure, chosen)
    if kind == "cost":
        return _cost(found, new_figure, chosen)
    if kind == "agreement":
        return _agreement(found, new_figure)
    raise BadInput(f'kind is "bars", "maps", "cost" or "agreement"; got {kind!r}')


def _maps(found: Comparison, new_figure: Callable[..., Any]) -> tuple[Any, Any]:
    down, across = len(found.images), 1 + len(found)
    drawing = new_figure(figsize=(TILE * across, TILE * down + 0.35), layout="constrained")
    axes = drawing.subplots(down, across, squeeze=False)
    for row, image in enumerate(found.images):
        pictures = [image, *(plots.blended(image, maps[row], bool((maps[row] < 0).any()), 0.6) for maps in found.maps)]
        for one, picture in zip(axes[row], pictures, strict=True):
            one.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            one.set_axis_off()
    for one, name in zip(axes[0], ("image", *found.methods), strict=True):
        one.set_title(plots.escaped(name.replace(".", ".\n", 1)), fontsize=7)
    return drawing, axes


def _bars(found: Comparison, new_figure: Callable[..., Any], chosen: Sequence[str]) -> tuple[Any, Any]:
    across = min(3, len(chosen))
    down = -(-len(chosen) // across)
    height = 0.22 * len(found) + 0.6
    drawing = new_figure(figsize=(3.4 * across, height * down), layout="constrained")
    axes = drawing.subplots(down, across, squeeze=False)
    for place, one in enumerate(axes.flat):
        if place >= len(chosen):
            one.set_axis_off()
            continue
        rows = [row for row in found.rows if row.metric == chosen[place] and row.images]
        for height_at, row in enumerate(reversed(rows)):
            colour = FLOOR if row.method in found.baselines else METHOD
            one.barh(height_at, row.mean, color=colour, height=0.72)
            one.plot([row.low, row.high], [height_at] * 2, color="black", linewidth=1)
        one.set_yticks(range(len(rows)), [plots.escaped(row.method) for row in reversed(rows)], fontsize=7)
        arrow = (
            "higher is better" if found.better[found.metrics.index(chosen[place])] == "higher" else "lower is better"
        )
        one.set_title(f"{plots.escaped(chosen[place])}, {arrow}", fontsize=8, loc="left")
        one.tick_params(axis="x", labelsize=7)
        one.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _cost(found: Comparison, new_figure: Callable[..., Any], chosen: Sequence[str]) -> tuple[Any, Any]:
    drawing = new_figure(figsize=(5.2, 3.6), layout="constrained")
    axes = drawing.subplots()
    ranks = found.mean_ranks(chosen)
    for name, rank in ranks.items():
        seconds = found.cost_seconds[found.methods.index(name)].item()
        axes.plot(1000 * seconds, rank, "o", color=METHOD)
        axes.annotate(
            plots.escaped(name), (1000 * seconds, rank), xytext=(4, 4), textcoords="offset points", fontsize=7
        )
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("milliseconds for an image", fontsize=8)
    axes.set_ylabel(f"mean rank over {len(chosen)} metrics, the best on top", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _agreement(found: Comparison, new_figure: Callable[..., Any]) -> tuple[Any, Any]:
    side = 0.28 * len(found) + 1.2
    drawing = new_figure(figsize=(3 * side, side + 0.5), layout="constrained")
    axes = drawing.subplots(1, 3)
    for place, (one, name, values) in enumerate(zip(axes, MEASURES, found.agreement, strict=True)):
        shown = one.imshow(values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        one.set_title(name, fontsize=8)
        one.set_xticks(range(len(found)), found.methods, fontsize=6, rotation=90)
        one.set_yticks(range(len(found)), found.methods if place == 0 else [""] * len(found), fontsize=6)
    drawing.colorbar(shown, ax=list(axes), shrink=0.8).ax.tick_params(labelsize=6)
    return drawing, axes
