"""What the drawings of embeddings and grids show."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from embedded import embedding
from matplotlib.colors import to_rgb

from torchloupe_core import plots
from torchloupe_core.embedding import Embedding
from torchloupe_core.errors import BadInput
from torchloupe_core.plots_embedding import PALETTE, UNKNOWN, apart, chosen_column, colours_of


@pytest.fixture(autouse=True, scope="module")
def without_a_screen() -> None:
    matplotlib.use("Agg")


@pytest.fixture
def found() -> Embedding:
    points = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3 - 1
    pictures = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 8, 8).clone()
    return embedding(points, labels=labels, classes=("ant", "b$e$e"), pictures=pictures)


def drawn_points(axes: Any) -> tuple[Any, Any]:
    points = next(one for one in axes.collections if len(one.get_offsets()))
    return points.get_offsets(), points.get_facecolors()


def test_every_point_has_its_place_and_the_colour_of_its_label(found: Embedding) -> None:
    figure = found.figure()
    (axes,) = figure.axes
    places, colours = drawn_points(axes)
    expected = {tuple(np.float32(one)): label for one, label in zip(found.points.tolist(), found.labels, strict=True)}
    assert len(places) == 40
    for place, colour in zip(places, colours, strict=True):
        label = int(expected[tuple(np.float32(place))])
        assert colour[:3] == pytest.approx(to_rgb(UNKNOWN if label < 0 else PALETTE[label]))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["ant", r"b\$e\$e", "unknown"]
    assert "40 images at fc.in, sklearn.pca" in figure.get_suptitle()


def test_a_scale_has_a_colour_bar_and_what_is_unknown_is_grey(found: Embedding) -> None:
    values = torch.linspace(-2, 3, 40)
    values[5] = torch.nan
    figure = found.figure(by=values)
    assert len(figure.axes) == 2 and figure.axes[1].get_ylim() == pytest.approx((-2, 3))
    column = chosen_column(found, values)
    colours = colours_of(column, 40)
    assert colours[5].tolist() == pytest.approx(to_rgb(UNKNOWN))
    viridis = matplotlib.colormaps["viridis"]
    assert colours[0].tolist() == pytest.approx(viridis(0.0)[:3]) and colours[39].tolist() == pytest.approx(
        viridis(1.0)[:3]
    )


def test_what_to_colour_by(found: Embedding) -> None:
    bare = embedding(found.points)
    assert chosen_column(bare, "auto") is None and chosen_column(found, None) is None
    assert len(bare.figure().axes) == 1 and not bare.figure().legends
    with pytest.raises(BadInput, match="no labels"):
        bare.figure(by="label")
    with pytest.raises(BadInput, match="by is \"label\", a value for each of the 40 points, or None; got 'loss'"):
        found.figure(by="loss")
    with pytest.raises(BadInput, match="one value for each of the 40"):
        found.figure(by=[1, 2])


def test_more_kinds_than_colours_are_put_together(found: Embedding) -> None:
    figure = found.figure(by=[str(n) for n in range(40)])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 20 and texts[-1] == "21 others"


def test_three_dimensions(found: Embedding) -> None:
    deep = embedding(torch.rand(10, 3), diagnostics={"explained_variance": [0.5, 0.25, 0.125]}, labels=torch.arange(10))
    (axes,) = deep.figure().axes
    assert axes.name == "3d" and axes.get_zlabel() == "component 3, 12% of the variance"
    with pytest.raises(BadInput, match="two dimensions; this embedding has 3"):
        deep.figure(images=True)


def test_pictures_stand_at_their_points_and_do_not_hide_each_other(found: Embedding) -> None:
    figure = found.figure(images=True, size=20)
    (axes,) = figure.axes
    (image,) = axes.images
    canvas = image.get_array()
    figure.draw_without_rendering()
    height, width = canvas.shape[:2]
    left, right, bottom, top = image.get_extent()
    hits = 0
    for row in range(40):
        x, y = found.points[row].tolist()
        across = (x - left) / (right - left) * width
        down = (top - y) / (top - bottom) * height
        value = canvas[int(down), int(across)]
        hits += bool(value[3] == 1 and abs(value[0] * 255 - row) < 0.5)
    shown = (
        40
        if "pictures of" not in figure.get_suptitle()
        else int(figure.get_suptitle().split("pictures of ")[1].split(",")[0])
    )
    assert 10 < shown <= 40 and hits >= shown * 0.8  # the middle of some lies under another


def test_squares_do_not_meet() -> None:
    places = np.random.default_rng(0).uniform(0, 200, (500, 2))
    taken = apart(places, 10, seed=0)
    chosen = places[taken]
    gaps = np.abs(chosen[:, None] - chosen).max(-1) + 1e9 * np.eye(len(chosen))
    assert gaps.min() >= 10
    left = np.setdiff1d(np.arange(500), taken)
    assert (np.abs(places[left][:, None] - chosen).max(-1).min(1) < 10).all()  # and none more would find room
    assert torch.equal(apart(places, 10, seed=0), taken) and not torch.equal(apart(places, 10, seed=1), taken)


def test_a_grid_shows_each_picture_in_its_cell(found: Embedding) -> None:
    grid = found.grid(shape=(5, 9))
    figure = grid.figure(size=8)
    (axes,) = figure.axes
    canvas = axes.images[0].get_array()
    assert canvas.shape == (5 * 9 - 1, 9 * 9 - 1, 3)
    table = grid.table()
    for row in range(5):
        for column in range(9):
            value = int(table[row, column])
            assert canvas[row * 9 + 4, column * 9 + 4, 0] == (255 if value < 0 else value)
    assert "40 images" in figure.get_suptitle()


def test_drawings_are_made_with_pyplot_and_as_files(found: Embedding) -> None:
    figure, axes = found.plot()
    assert figure.axes[0] is axes
    assert plots.png(found)[:4] == b"\x89PNG" and found.grid()._repr_png_()[:4] == b"\x89PNG"
    import matplotlib.pyplot as plt

    plt.close("all")
    assert math.isclose(figure.get_figwidth(), 8.6)
