"""The drawing of examples: what lies where, and what is said about it."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor

from torchloupe_core import plots_examples
from torchloupe_core.examples import Examples

matplotlib.use("Agg")


def examples(crops: list[list[Tensor | None]], **changes: Any) -> Examples:
    """With pictures in memory: boxes say how large they are."""
    units, k = len(crops), len(crops[0])
    there = torch.tensor([[crop is not None for crop in row] for row in crops])
    boxes = torch.tensor([[[0, 0, *(crop.shape[1:] if crop is not None else (0, 0))] for crop in row] for row in crops])
    pixels = torch.cat([(crop * 255).byte().flatten() for row in crops for crop in row if crop is not None])
    found = {
        "method": "examples",
        "backend": "native",
        "seed": 0,
        "seconds": 0.0,
        "forwards": 0,
        "versions": {},
        "options": {},
        "units": tuple(f"layer:{unit}" for unit in range(units)),
        "asked": ("layer",) * units,
        "scores": torch.arange(units * k).view(units, k) / 8,
        "indices": torch.where(there, 0, -1),
        "positions": torch.zeros(units, k, 2, dtype=torch.long),
        "boxes": boxes,
        "outside": torch.zeros(units, k, 4, dtype=torch.long),
        "points": torch.full((units, k, 2), torch.nan),
        "sizes": torch.full((units, k, 2), 64),
        "labels": torch.full((units, k), -1),
        "crop": "patch",
        "band": "max",
        "bands": (),
        "images": 1234,
        "pixels": pixels,
    }
    return Examples(**{**found, **changes})


def drawn(found: Examples, **options: Any) -> tuple[Any, Any, list[str]]:
    figure = found.figure(**options)
    (axes,) = figure.axes
    return figure, axes, [text.get_text() for text in axes.texts]


def tile(axes: Any, place: int, columns: int) -> Tensor:
    """One tile of the picture."""
    picture = torch.from_numpy(axes.images[0].get_array().data)  # [H, W, 3]
    size = plots_examples.TILE
    down, across = size + 13 + 7, size + 7
    y, x = 13 + down * (place // columns), 1 + across * (place % columns)
    return picture[y : y + size, x : x + size]


def test_each_score_stands_above_its_tile_and_each_unit_before_its_row() -> None:
    patch = torch.full((3, 8, 8), 0.5)
    figure, _, texts = drawn(examples([[patch, patch, None], [patch, patch, patch]]))
    assert texts == ["0", "0.125", "", "0.375", "0.5", "0.625", "layer:0", "layer:1"]
    title = figure._suptitle.get_text()
    assert title == "2 units, 3 receptive fields each, largest first\n1,234 images searched; numbers are activations"


def test_patches_of_a_row_keep_their_proportions_and_their_side() -> None:
    whole, half = torch.zeros(3, 8, 8), torch.zeros(3, 4, 8)
    outside = torch.zeros(1, 3, 4, dtype=torch.long)
    outside[0, 1] = torch.tensor([4, 0, 0, 0])  # cut off above: what is left lies below
    outside[0, 2] = torch.tensor([0, 0, 4, 0])
    _, axes, _ = drawn(examples([[whole, half, half]], outside=outside))
    size = plots_examples.TILE
    dark = [tile(axes, place, 3)[:, 0, 0] < 0.5 for place in range(3)]
    assert dark[0].all()
    assert not dark[1][: size // 2].any() and dark[1][size // 2 :].all()
    assert dark[2][: size // 2].all() and not dark[2][size // 2 :].any()
    _, axes, _ = drawn(examples([[half, half, half]]))
    assert (tile(axes, 0, 3)[size // 4 : 3 * size // 4] < 0.5).all() and (tile(axes, 0, 3)[: size // 4] > 0.9).all()


def test_a_patch_is_marked_in_its_image() -> None:
    image = torch.full((3, 64, 64), 0.5)
    boxes, points = torch.tensor([[[8, 16, 24, 48], [0, 0, 64, 64]]]), torch.tensor([[[16.0, 32.0], [16.0, 32.0]]])
    figure, axes, _ = drawn(examples([[image, image]], crop="image", boxes=boxes, points=points))
    factor = plots_examples.TILE / 64
    patches = [patch for patch in axes.patches if type(patch).__name__ == "Rectangle"]
    circles = [patch for patch in axes.patches if type(patch).__name__ == "Circle"]
    assert [(one.get_width(), one.get_height()) for one in patches] == [(32 * factor, 16 * factor)] * 2
    assert patches[0].get_xy() == (1 - 0.5 + 16 * factor, 13 - 0.5 + 8 * factor)
    assert circles[0].center == (1 + plots_examples.TILE + 7 - 0.5 + 32 * factor, 13 - 0.5 + 16 * factor)
    assert "where, in yellow" in figure._suptitle.get_text()
    _, axes, _ = drawn(examples([[image, image]]))  # nothing to mark without a position
    assert not axes.patches


def test_bands_stand_above_their_columns() -> None:
    patch = torch.full((3, 8, 8), 0.5)
    _, _, texts = drawn(examples([[patch] * 3], band="spectrum", bands=("minimum", "median", "median")))
    assert texts[-2:] == ["minimum", "median"]


def test_the_first_units_of_many_are_drawn_and_only_those_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = torch.full((3, 8, 8), 0.5)
    found = examples([[patch] * 2] * 30, skipped={"x": "y"})
    figure, _, texts = drawn(found)
    assert len(texts) == 12 * 3 and figure._suptitle.get_text().startswith("12 of 30 units, 2 receptive")
    assert "1 could not be read" in figure._suptitle.get_text()
    _, _, texts = drawn(found, most=2, columns=1)
    assert texts == ["0", "0.25", "layer:0", "layer:1"]
