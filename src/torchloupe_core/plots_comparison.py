"""Drawings of a comparison: maps side by side, means with their intervals, cost against faithfulness."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchloupe_core import plots
from torchloupe_core.comparison import Comparison
from torchloupe_core.errors import BadInput

__all__ = ["MEASURES", "overlays"]

Kind = Literal["maps", "bars", "cost", "agreement"]

TILE, LETTER = 1.3, 0.055  # inches
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


def overlays(found: Comparison) -> Tensor:
    """`[M, S, 3, H, W]` in [0, 1]: every method's maps of the first images in colour, over those images in grey."""
    grey = found.images.mean(1, keepdim=True).expand_as(found.images)
    signed = [bool((maps < 0).any()) for maps in found.maps]
    if not len(grey):
        return found.maps[:, :, None]
    return torch.stack(
        [
            torch.stack([plots.blended(image, one, sign, 0.6) for image, one in zip(grey, maps, strict=True)])
            for maps, sign in zip(found.maps, signed, strict=True)
        ]
    )


def _maps(found: Comparison, new_figure: Callable[..., Any]) -> tuple[Any, Any]:
    if not len(found.images):
        raise BadInput("no maps were kept, since none of the first images could be read")
    down, across = len(found.images), 1 + len(found)
    drawing = new_figure(figsize=(TILE * across, TILE * down + 0.35), layout="constrained")
    axes = drawing.subplots(down, across, squeeze=False)
    drawn = overlays(found)
    for row, image in enumerate(found.images):
        for one, picture in zip(axes[row], (image, *drawn[:, row]), strict=True):
            one.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(plots.escaped(textwrap.fill(found.targets[row], 22, max_lines=2)), fontsize=7)
    for one, name in zip(axes[0], ("image", *found.methods), strict=True):
        one.set_title(_broken(name), fontsize=7)
    return drawing, axes


def _broken(name: str, most: int = 16) -> str:
    """A method's name in lines that fit over a picture: broken after the backend, and where it is long."""
    lines = [""]
    for part in name.replace(".", ".\n").replace("_", "_\n").splitlines():
        if lines[-1].endswith(".") or len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    return plots.escaped("\n".join(lines))


def _bars(found: Comparison, new_figure: Callable[..., Any], chosen: Sequence[str]) -> tuple[Any, Any]:
    across = min(3, len(chosen))
    down = -(-len(chosen) // across)
    height, width = 0.22 * len(found) + 0.6, 2.1 + LETTER * max(map(len, found.methods))
    drawing = new_figure(figsize=(width * across, height * down), layout="constrained")
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
        one.xaxis.get_offset_text().set_fontsize(7)
        one.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _cost(found: Comparison, new_figure: Callable[..., Any], chosen: Sequence[str]) -> tuple[Any, Any]:
    drawing = new_figure(figsize=(5.2, 3.6), layout="constrained")
    axes = drawing.subplots()
    ranks = found.mean_ranks(chosen)
    milliseconds = [1000 * found.cost_seconds[found.methods.index(name)].item() for name in ranks]
    axes.plot(milliseconds, list(ranks.values()), "o", color=METHOD)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("milliseconds for an image", fontsize=8)
    axes.set_ylabel(f"mean rank over {len(chosen)} metrics, the best on top", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    plots.name_points(drawing, axes, dict(zip(ranks, zip(milliseconds, ranks.values(), strict=True), strict=True)))
    return drawing, axes


def _agreement(found: Comparison, new_figure: Callable[..., Any]) -> tuple[Any, Any]:
    side, names = 0.28 * len(found) + 0.4, [plots.escaped(name) for name in found.methods]
    room = LETTER * max(map(len, names))
    drawing = new_figure(figsize=(3 * side + room + 0.8, side + room + 0.2), layout="compressed")
    axes = drawing.subplots(1, 3)
    for place, (one, name, values) in enumerate(zip(axes, MEASURES, found.agreement, strict=True)):
        shown = one.imshow(values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        one.set_title(name, fontsize=8)
        one.set_xticks(range(len(found)), names, fontsize=6, rotation=90)
        one.set_yticks(range(len(found)), names if place == 0 else [""] * len(found), fontsize=6)
    drawing.colorbar(shown, ax=list(axes), shrink=0.8).ax.tick_params(labelsize=6)
    return drawing, axes
