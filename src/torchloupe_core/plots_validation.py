"""The drawing of a validation: what was foretold against what came, and what is found and lost by going by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchloupe_core import mosaic, plots
from torchloupe_core.validation import Validation

__all__: list[str] = []

PALETTE = ("#3465a4", "#d9822b", "#2e7d4f", "#8e4a9e", "#b03a3a", "#4a8f94", "#7a6a2f", "#555f6e")
GREY, DASHES = "#8a919c", ("-", "--", "-.", ":")
MOST = 2_000  # points of one method in one panel
WIDTH, HEIGHT = 3.1, 3.0  # inches of a panel
PAIRS = {
    "single": ("leave one out", "leave_one_out"),
    "group": ("leave k out", "leave_k_out"),
    "subset": ("subsets", "lds"),
}


@plots.draw.register
def _draw_validation(found: Validation, new_figure: Callable[..., Any]) -> tuple[Any, Any]:
    """A panel for each check: predicted against actual changes, precision@k, loss by share removed."""
    panels: list[Callable[[Any], None]] = [
        _scatter(found, kind) for kind in PAIRS if getattr(found, f"{kind}_actual") is not None
    ]
    panels += [lambda axes: _precision(found, axes)] if found.wrong is not None else []
    panels += [lambda axes: _removal(found, axes)] if found.removal is not None else []
    drawing = new_figure(figsize=(max(2, len(panels)) * WIDTH, HEIGHT + 0.9), layout="constrained")
    axes = drawing.subplots(1, len(panels), squeeze=False)[0]
    for panel, one in zip(panels, axes, strict=True):
        panel(one)
        one.tick_params(labelsize=6.5)
        one.spines[["top", "right"]].set_visible(False)
    handles = {text: handle for one in axes for handle, text in zip(*one.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles, loc="outside lower left", ncols=4, fontsize=7, frameon=False)
    mosaic.title(drawing, [f"influence against {found.refits}; {found.about}"])
    return drawing, axes


def _scatter(found: Validation, kind: str) -> Callable[[Any], None]:
    heading, column = PAIRS[kind]
    predicted, actual = getattr(found, f"{kind}_predicted"), getattr(found, f"{kind}_actual")

    def draw(axes: Any) -> None:
        axes.axhline(0, color="#d5d9e0", linewidth=0.8, zorder=0)
        for place, name in enumerate(found.names):
            x, y = _standard(predicted[place]), _standard(actual)
            some = torch.linspace(0, len(x) - 1, min(MOST, len(x))).long()
            label = mosaic.short(name, 24)
            axes.scatter(x[some], y[some], s=5, alpha=0.45, linewidths=0, color=_colour(place), label=label)
        values = "  ".join(_figure(row[column]) for row in found.rows[: len(found.names)])
        axes.set_title(f"{heading}\nranks agree {values}", fontsize=7.5, loc="left")
        axes.set_xlabel("foretold, standardised for each test", fontsize=7)
        axes.set_ylabel("change after training without, likewise", fontsize=7)

    return draw


def _precision(found: Validation, axes: Any) -> None:
    if found.wrong is None:
        return
    count = int(found.wrong.sum())
    steps = sorted({max(1, round(step)) for step in torch.linspace(1, min(2 * count, len(found.wrong)), 40).tolist()})
    curves = [found.precision_at(k) for k in steps]
    for place, name in enumerate(found.suspicious):
        if name in curves[0]:
            line: dict[str, Any] = {"color": _colour(place)}
            if place >= len(found.names):
                line = {"color": GREY, "linestyle": DASHES[(place - len(found.names)) % len(DASHES)]}
            axes.plot(steps, [one[name] for one in curves], linewidth=1.3, label=mosaic.short(name, 24), **line)
    axes.axvline(count, color="#d5d9e0", linewidth=0.8, zorder=0)
    axes.axhline(count / len(found.wrong), color="#d5d9e0", linewidth=0.8, zorder=0)
    axes.set(ylim=(0, 1.03))
    axes.set_title(f"wrong labels found\nof {count} among {len(found.wrong):,}", fontsize=7.5, loc="left")
    axes.set_xlabel("k most suspicious images", fontsize=7)
    axes.set_ylabel("share of them wrong", fontsize=7)


def _removal(found: Validation, axes: Any) -> None:
    if found.removal is None:
        return
    x = [0.0, *(100 * share for share in found.shares)]
    for place, curve in enumerate(found.removal):
        own = place < len(found.names)
        line: dict[str, Any] = {"color": _colour(place)} if own else {"color": GREY, "linestyle": ":"}
        label = mosaic.short(found.names[place], 24) if own else "at random"
        y = [found.question, *curve.tolist()]
        axes.plot(x, y, marker="o", markersize=2.5, linewidth=1.3, label=label, **line)
    axes.set_title("the most helpful removed\n", fontsize=7.5, loc="left")
    axes.set_xlabel("percent of the training images", fontsize=7)
    axes.set_ylabel(f"mean {found.about}", fontsize=7)


def _standard(values: Tensor) -> Tensor:
    """All tests in one row, each less its mean and with its own standard deviation as the unit."""
    spread = values.std(1, keepdim=True)
    return ((values - values.mean(1, keepdim=True)) / spread.where(spread > 0, 1.0)).flatten()


def _colour(place: int) -> str:
    return PALETTE[place % len(PALETTE)]


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
