"""The drawing of an audit: each shortcut by itself, and in the images that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchloupe_core import plots
from torchloupe_core.audit import Audit

__all__: list[str] = []

TILE = 1.25  # inches


@plots.draw.register
def _draw_audit(found: Audit, new_figure: Callable[..., Any]) -> tuple[Any, Any]:
    """One row a shortcut: the median of the region, then images with it framed; above, what it does."""
    down, across = max(1, len(found)), 1 + (found.pictures.shape[1] if len(found) else 4)
    drawing = new_figure(figsize=(TILE * across, (TILE + 0.5) * down), layout="constrained")
    axes = drawing.subplots(down, across, squeeze=False)
    for one in axes.flat:
        one.set_axis_off()
    if not len(found):
        drawing.suptitle(plots.escaped(found.table().strip()), fontsize=8)
    for row, name in enumerate(found.classes):
        axes[row][0].imshow(found.patches[row].permute(1, 2, 0).clamp(0, 1).numpy())
        says = (
            f"{name}: {len(found.members[row])} images have it; pasted into others, {found.transplanted[row]:.0%} "
            f"become {name}; covered, {found.covered[row]:.0%} change"
        )
        axes[row][0].set_title(plots.escaped(says), fontsize=7, loc="left").set_in_layout(False)
        for one, picture, box in zip(axes[row][1:], found.pictures[row], found.boxes[row].tolist(), strict=True):
            one.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            top, left, bottom, right = box
            plots.frame(one, (left - 0.5, top - 0.5), right - left, bottom - top)
    return drawing, axes
