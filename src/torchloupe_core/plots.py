"""Drawings of results. Functions of results only; matplotlib is imported inside."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping
from functools import singledispatch
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchloupe_core.results import Attribution, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "blended",
    "colour_bar",
    "colours",
    "draw",
    "escaped",
    "figure",
    "frame",
    "name_points",
    "overlay",
    "png",
    "ring",
    "scale",
    "show",
]

MOST_ROWS = 12
SIGNED, POSITIVE = "RdBu_r", "viridis"  # diverging around zero; perceptually uniform
MARKS = (("black", 1.8), ("#ffd400", 1.0))  # yellow on black shows on any picture
AWAY = (0, -8, 8, -16, 16, -24, 24, -32, 32)  # points down from a point to its name
CLIPPED = 0.995  # a few extreme pixels would otherwise leave the rest of a gradient map pale


def show(result: Result, **options: Any) -> tuple[Any, Any]:
    """Draws a result into a new pyplot figure; returns `(figure, axes)`."""
    import matplotlib.pyplot as plt

    return _drawn(result, lambda **size: plt.figure(**size), **options)


def figure(result: Result, **options: Any) -> Figure:
    """The drawing of a result, outside pyplot."""
    from matplotlib.figure import Figure

    drawn: Figure = _drawn(result, lambda **size: Figure(**size), **options)[0]
    return drawn


def png(result: Result, *, dpi: int = 100, **options: Any) -> bytes:
    """The drawing of a result as a PNG file."""
    buffer = io.BytesIO()
    figure(result, **options).savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def overlay(attribution: Attribution, *, alpha: float = 0.6) -> Tensor:
    """`[N, 3, H, W]` in [0, 1]: the map in colour over each image, stronger where the map is."""
    values = attribution.upsample()
    images = attribution.images.mean(1, keepdim=True).expand(-1, 3, -1, -1)  # grey, so that colour means the map
    signed = is_signed(attribution)
    return torch.stack([blended(image, one, signed, alpha) for image, one in zip(images, values, strict=True)])


def scale(values: Tensor, signed: bool) -> tuple[float, float]:
    """The values drawn at the two ends of the colours: nearly the extremes, and symmetric around zero if signed."""
    ordered = (values.abs() if signed else values).flatten().sort().values
    high = ordered[int(CLIPPED * (len(ordered) - 1))].item()
    low = -high if signed else ordered[0].item()
    flat = high - low <= 1e-6 * max(abs(low), abs(high))  # rounding is no contrast
    return (low, high) if not flat else (low - 1.0, low + 1.0) if signed else (low, low + 1.0)


def colours(values: Tensor, signed: bool, ends: tuple[float, float] | None = None) -> Tensor:
    """`[3, H, W]` in [0, 1]: a map in its colours. ends: the values at their two ends, its own unless given."""
    import matplotlib

    low, high = ends or scale(values, signed)
    position = ((values - low) / (high - low)).clamp(0, 1)
    rgb = torch.from_numpy(matplotlib.colormaps[SIGNED if signed else POSITIVE](position.numpy()))
    return rgb[..., :3].permute(2, 0, 1).float()


def is_signed(attribution: Attribution) -> bool:
    """Whether to draw with the diverging map: the method gives signs and this map has some."""
    return attribution.signed and bool((attribution.values < 0).any())


def blended(image: Tensor, values: Tensor, signed: bool, alpha: float) -> Tensor:
    """`[3, H, W]`: a map in colour over a picture of its size, on its own scale; where it is signed, zero is clear."""
    strength = torch.full_like(values, alpha)
    if signed:  # zero is neutral: let the image through there
        strength = alpha * (values.abs() / scale(values, signed)[1]).clamp(0, 1).sqrt()
    return image * (1 - strength) + colours(values, signed) * strength


def colour_bar(drawing: Any, axes: Any, ends: tuple[float, float], signed: bool, **size: Any) -> None:
    """The colours and the values they stand for, beside the axes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades = ScalarMappable(Normalize(*ends), SIGNED if signed else POSITIVE)
    bar = drawing.colorbar(shades, ax=axes, **{"fraction": 0.046, "pad": 0.03, **size})
    bar.ax.tick_params(labelsize=7)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize(7)


def frame(axes: Any, corner: tuple[float, float], width: float, height: float) -> None:
    """A rectangle that shows on any picture, from its corner (x, y)."""
    from matplotlib.patches import Rectangle

    for colour, line in MARKS:
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line))


def ring(axes: Any, middle: tuple[float, float], radius: float) -> None:
    """A circle that shows on any picture."""
    from matplotlib.patches import Circle

    for colour, line in MARKS:
        axes.add_patch(Circle(middle, radius, fill=False, edgecolor=colour, linewidth=line))


def name_points(drawing: Any, axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """A name beside each point, right or left, moved up or down until it lies on no other name and no point."""
    from matplotlib.transforms import Bbox

    drawing.draw_without_rendering()  # or it is not known where points are
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform([*points.values()])]
    for name, point in points.items():
        for down, (side, aligned) in product(AWAY, ((6, "left"), (-6, "right"))):
            text = axes.annotate(
                escaped(name), point, (side, -down), "data", "offset points", fontsize=7, va="center", ha=aligned
            )
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= drawing.bbox.x1
            if (down, side) == (AWAY[-1], -6) or (inside and not any(box.overlaps(other) for other in taken)):
                taken.append(box)
                break
            text.remove()


def _drawn(result: Result, new_figure: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    importlib.import_module(result.drawings)  # which registers how this kind is drawn
    return draw(result, new_figure, **options)


@singledispatch
def draw(result: Result, new_figure: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """The figure and its axes; a kind of result registers its own here."""
    raise TypeError(f"{type(result).__name__} has no drawing")


@draw.register
def _draw_attribution(
    attribution: Attribution, new_figure: Callable[..., Any], *, alpha: float = 0.6, most: int = MOST_ROWS
) -> tuple[Any, Any]:
    """One row an image: what the model was shown, and the map over it with its scale."""
    rows = min(len(attribution), most)
    drawing = new_figure(figsize=(6.4, 0.15 + 3.05 * rows), layout="constrained")
    axes = drawing.subplots(rows, 2, squeeze=False)
    pictures = overlay(attribution, alpha=alpha)
    signed = is_signed(attribution)
    for row in range(rows):
        left, right = axes[row]
        left.imshow(attribution.images[row].permute(1, 2, 0).numpy())
        right.imshow(pictures[row].permute(1, 2, 0).numpy())
        left.set_title(_target_title(attribution, row), fontsize=9, loc="left")
        right.set_title(_method_title(attribution), fontsize=9, loc="left")
        colour_bar(drawing, right, scale(attribution.upsample()[row], signed), signed)
        for one in (left, right):
            one.set_axis_off()
    if rows < len(attribution):
        drawing.supxlabel(f"{rows} of {len(attribution)} images", fontsize=8)
    return drawing, axes


def _target_title(attribution: Attribution, row: int) -> str:
    return f"{_cut(attribution.targets[row])}\n= {attribution.scores[row].item():.3g}"


def _method_title(attribution: Attribution) -> str:
    where = f"at {attribution.layer}" if attribution.layer else "at the input"
    return f"{attribution.method}\n{_cut(where)}"


def _cut(text: str, most: int = 40) -> str:
    """A text short enough for a title, its dollars no mathematics."""
    return escaped(text if len(text) <= most else text[: most - 1] + "…")


def escaped(text: str) -> str:
    """A text whose dollars are no mathematics."""
    return text.replace("$", r"\$")
