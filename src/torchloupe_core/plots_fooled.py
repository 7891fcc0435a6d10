"""Drawings of fooled models: before, the difference magnified, after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchloupe_core import plots
from torchloupe_core.fooled import Fooled
from torchloupe_core.making import pictures

__all__ = ["magnified"]

MOST, TILE = 12, 1.75  # inches
GOOD, BAD = "#1a7f45", "#b3261e"
REACH = 0.5  # of the pixel range, to which the largest change is magnified


@plots.draw.register
def _draw_fooled(fooled: Fooled, new_figure: Callable[..., Any], *, most: int = MOST) -> tuple[Any, Any]:
    """A row an image: before with what is seen in it, the difference around grey and how much it is magnified, after.

    Green is what was wanted, red is not.
    """
    rows = min(len(fooled), most)
    height = TILE * fooled.size[0] / fooled.size[1] + 0.3
    drawing = new_figure(figsize=(3 * TILE + 0.2, height * rows + 0.35), layout="constrained")
    axes = drawing.subplots(rows, 3, squeeze=False)
    given, images = pictures(fooled.given), pictures(fooled.images)
    for row in range(rows):
        difference, factor = magnified(fooled, row)
        seen = [
            f"{name} {100 * each[row].max().item():.0f}%"
            for name, each in zip(fooled.seen(row), (fooled.before, fooled.after), strict=True)
        ]
        aim = int(fooled.aims[row])
        if aim >= 0 and not fooled.success[row]:
            seen[1] += f", {fooled.name(aim)} {100 * fooled.after[row, aim].item():.0f}%"
        titles = (seen[0], f"difference x{factor:.3g}", seen[1])
        colours = ("black", "black", GOOD if fooled.success[row] else BAD)
        shown = zip(axes[row], (given[row], difference, images[row]), titles, colours, strict=True)
        for one, picture, title, colour in shown:
            one.imshow(
                picture.permute(1, 2, 0).clamp(0, 1).numpy(),
                interpolation="nearest" if picture.shape[-1] < 128 else None,
            )
            one.set_axis_off()
            one.set_title(plots.escaped(title), fontsize=7.5, loc="left", pad=3, color=colour)
    note = f"{int(fooled.success.sum())} of {len(fooled)} fooled, {_bound(fooled)}"
    drawing.supxlabel(plots.escaped("; ".join(filter(None, (note, fooled.stopped)))), fontsize=7)
    return drawing, axes


def magnified(fooled: Fooled, index: int) -> tuple[Tensor, float]:
    """`[3, H, W]`: the difference of one image around grey, and the factor that makes its largest half the range."""
    difference = fooled.difference[index : index + 1]
    largest = difference.abs().max().item()
    factor = REACH / largest if largest else 1.0
    return pictures(0.5 + factor * difference)[0], factor


def _bound(fooled: Fooled) -> str:
    if fooled.norm == "linf":
        return f"no channel of a pixel by more than {255 * fooled.eps:.3g} of 255"
    return f"L2 norm of at most {fooled.eps:.3g}"
