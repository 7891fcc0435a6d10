"""The drawing of suspicious labels: the images with what they are labelled and what the model sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torchloupe_core import mosaic, plots
from torchloupe_core.suspects import THUMBNAIL, Suspects

__all__: list[str] = []

ACROSS, BESIDE, ABOVE = 8, 14, 32  # pictures in a row; pixels between and above them
GIVEN, SEEN = "#a3211c", "#1a6e37"


@plots.draw.register
def _draw_suspects(
    found: Suspects, new_figure: Callable[..., Any], *, k: int = 24, by: str | None = None
) -> tuple[Any, Any]:
    """The most suspicious first, row by row: the label in red over what the model takes it for, in green."""
    rows = found.order(by)[:k]
    across = min(ACROSS, len(rows))
    down = math.ceil(len(rows) / across)
    width, height = across * (THUMBNAIL + BESIDE), down * (THUMBNAIL + ABOVE)
    drawing = new_figure(figsize=((width + 30) / mosaic.INCH, (height + 60) / mosaic.INCH), layout="constrained")
    axes = drawing.subplots()
    axes.set(xlim=(-4, width), ylim=(height, -2), aspect="equal")
    axes.set_axis_off()
    axes.set_anchor("NW")
    for place, (row, picture) in enumerate(zip(rows.tolist(), found.thumbnails(rows, THUMBNAIL), strict=True)):
        x, top = place % across * (THUMBNAIL + BESIDE), place // across * (THUMBNAIL + ABOVE) + ABOVE - 6
        rgb = picture.permute(1, 2, 0).numpy()
        axes.imshow(rgb, extent=(x, x + THUMBNAIL, top + THUMBNAIL, top), interpolation="nearest", aspect="auto")
        seen = f"sees {found.class_name(int(found.predictions[row]))} {found.confidences[row].item():.0%}"
        given = mosaic.short(found.class_name(int(found.labels[row])), 20)
        colour = SEEN if found.predictions[row] != found.labels[row] else "#222222"
        axes.text(x, top - 13, given, fontsize=6.5, color=GIVEN, va="bottom", fontweight="bold")
        axes.text(x, top - 2, mosaic.short(seen, 22), fontsize=6.5, color=colour, va="bottom")
    what = "all scores together" if by is None else by.replace("_", "-")
    mosaic.title(drawing, [f"{len(rows)} of {len(found):,} labels, most suspicious first, by {what}"])
    return drawing, axes
