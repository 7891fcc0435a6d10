"""The drawing of influence: each test image with its most helpful and most harmful training images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchloupe_core import mosaic, plots
from torchloupe_core.influence import RELATIVE, THUMBNAIL, Influence, Kind

__all__: list[str] = []

MOST_ROWS, EACH = 6, 4  # test images, and training images of each kind
HELPFUL, HARMFUL, PLAIN = "#1a6e37", "#a3211c", "#222222"
BESIDE, ABOVE, BETWEEN = 12, 32, 26  # pixels between pictures, over them for text, between the three columns


@plots.draw.register
def _draw_influence(
    found: Influence, new_figure: Callable[..., Any], *, most: int = MOST_ROWS, k: int = EACH
) -> tuple[Any, Any]:
    """One row a test image, under its prediction; right of it those that support it, then those against it.

    A training image whose label is not what the test is taken for has it in bold; scores are under the labels.
    """
    if not len(found.test_indices):
        return _draw_alone(found, new_figure, most * k)
    rows = range(min(len(found), most))
    panels = {kind: _panel(found, kind, k) for kind in ("helpful", "harmful")}
    wide = min(k, found.scores.shape[1])
    tests = found.pictures("test", found.test_indices[: len(rows)].tolist())
    train = found.pictures("train", [cell[0] for cells in panels.values() for row in rows for cell in cells[row]])
    lefts = [0, THUMBNAIL + BETWEEN, THUMBNAIL + 2 * BETWEEN + wide * (THUMBNAIL + BESIDE)]
    width = lefts[2] + wide * (THUMBNAIL + BESIDE)
    drawing, axes = _canvas(new_figure, width, len(rows), 22)
    for row in rows:
        top = 22 + row * (THUMBNAIL + ABOVE)
        _place(axes, tests[int(found.test_indices[row])], 0, top, _test_lines(found, row), PLAIN)
        for (kind, cells), left in zip(panels.items(), lefts[1:], strict=True):
            for place, (index, score, label) in enumerate(cells[row]):
                colour = HELPFUL if kind == "helpful" else HARMFUL
                other = label != found.predictions[row].item()
                lines = (found.name_of(label), f"{score:+.2g}")
                x = left + place * (THUMBNAIL + BESIDE)
                _place(axes, train[index], x, top, lines, colour, bold=other)
    heads = ("asked about", "most helpful: removing it hurts", "most harmful: removing it helps")
    for text, x, colour in zip(heads, lefts, (PLAIN, HELPFUL, HARMFUL), strict=True):
        axes.text(x, 0, text, fontsize=7.5, color=colour, ha="left", va="top", fontweight="bold")
    mosaic.title(drawing, _title(found, len(rows)))
    return drawing, axes


def _draw_alone(found: Influence, new_figure: Callable[..., Any], most: int) -> tuple[Any, Any]:
    """The training images that influence themselves most, in rows."""
    ranking = found.top(most)
    cells = list(zip(*(part[0].tolist() for part in ranking), strict=True))
    columns = min(len(cells), 2 * EACH)
    rows = -(-len(cells) // columns)
    drawing, axes = _canvas(new_figure, columns * (THUMBNAIL + BESIDE), rows, 0)
    train = found.pictures("train", [cell[0] for cell in cells])
    for place, (index, score, label) in enumerate(cells):
        x, top = place % columns * (THUMBNAIL + BESIDE), place // columns * (THUMBNAIL + ABOVE)
        lines = (found.name_of(label), f"{score:.2g}  #{index}")
        _place(axes, train[index], x, top, lines, PLAIN)
    mosaic.title(
        drawing,
        [f"{found.method}: {len(cells)} of {found.scores.shape[1]:,} training images, largest first", *_how(found)],
    )
    return drawing, axes


def _canvas(new_figure: Callable[..., Any], width: int, rows: int, above: int) -> tuple[Any, Any]:
    height = above + rows * (THUMBNAIL + ABOVE)
    drawing = new_figure(figsize=((width + 30) / mosaic.INCH, (height + 76) / mosaic.INCH), layout="constrained")
    axes = drawing.subplots()
    axes.set(xlim=(-4, width), ylim=(height, -2), aspect="equal")
    axes.set_axis_off()
    axes.set_anchor("NW")
    return drawing, axes


def _place(
    axes: Any, picture: Tensor, x: int, top: int, lines: tuple[str, str], colour: str, *, bold: bool = False
) -> None:
    """A picture with two lines of text over it."""
    begin = top + ABOVE - 6
    rgb = picture.permute(1, 2, 0).numpy()
    axes.imshow(rgb, extent=(x, x + THUMBNAIL, begin + THUMBNAIL, begin), interpolation="nearest", aspect="auto")
    weight = "bold" if bold else "normal"
    axes.text(x, begin - 13, mosaic.short(lines[0], 20), fontsize=6.5, color=colour, va="bottom", fontweight=weight)
    axes.text(x, begin - 2, mosaic.short(lines[1], 22), fontsize=6.5, color=colour, va="bottom")


def _test_lines(found: Influence, row: int) -> tuple[str, str]:
    seen = f"{found.name_of(found.predictions[row].item())} {found.confidences[row].item():.0%}"
    label = found.test_labels[row].item()
    return f"sees {seen}", f"is {found.name_of(label)}" if label >= 0 else found.about[row]


def _panel(found: Influence, kind: Kind, k: int) -> list[list[tuple[int, float, float]]]:
    """For each test image the training images to show: index, score, label. Only those whose sign fits the heading."""
    ranking = found.top(k, kind)
    fits = ranking.scores > 0 if kind == "helpful" else ranking.scores < 0
    rows = zip(*(part.tolist() for part in (*ranking, fits)), strict=True)
    return [[cell[:3] for cell in zip(*row, strict=True) if cell[3]] for row in rows]


def _title(found: Influence, rows: int) -> list[str]:
    what = "images" if len(found) > 1 else "image"
    first = f"{found.method}: {mosaic.some(rows, len(found))} test {what}, {found.scores.shape[1]:,} training images"
    if torch.unique(found.test_labels).tolist() != [-1] and not found.about[0].startswith("loss"):
        first += f"; about {found.about[0]}" if len(set(found.about)) == 1 else ""
    return [first, *_how(found)]


def _how(found: Influence) -> list[str]:
    layers = ", ".join(found.layers[:3]) + (f" and {len(found.layers) - 3} more" if len(found.layers) > 3 else "")
    relative = [f"scores {RELATIVE}"] if found.units.endswith(RELATIVE) else []
    parts = [f"through {layers} ({found.parameters:,} parameters)", *relative]
    checked = found.diagnostics.get("spot_check")
    if checked:
        parts.append(f"rank correlation with {len(checked['removed'])} refits {checked['spearman']:.2f}")
    return ["; ".join(parts)]
