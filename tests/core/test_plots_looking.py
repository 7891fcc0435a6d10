"""Drawings of filters and feature maps: what is shown, how much of it, and what is said about it."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor

from torchloupe_core import mosaic, plots_looking
from torchloupe_core.activations import Activations
from torchloupe_core.filters import Filters

matplotlib.use("Agg")

FACTS: dict[str, Any] = {
    "method": "weights",
    "backend": "native",
    "seed": 0,
    "seconds": 0.0,
    "forwards": 0,
    "versions": {},
    "options": {},
}


def filters(images: Tensor, **changes: Any) -> Filters:
    found = {
        "images": images,
        "inputs": torch.arange(images.shape[1]).expand(len(images), -1),
        "layer": "conv",
        "channels": tuple(range(len(images))),
        "colour": False,
        "diagnostics": {"kind": "Conv2d"},
    }
    return Filters(**{**FACTS, **found, **changes})


def activations(maps: Tensor, **changes: Any) -> Activations:
    found = {
        "maps": maps,
        "images": torch.full((len(maps), 3, 32, 40), 0.5),
        "layer": "layer4",
        "channels": tuple(range(maps.shape[1])),
    }
    return Activations(**{**FACTS, **found, **changes})


def title(figure: Any) -> str:
    return figure._suptitle.get_text().replace("\n", " ")


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def shown(axes: Any) -> Tensor:
    """What an axes shows, `[3, H, W]`."""
    return torch.from_numpy(axes.images[0].get_array().data).permute(2, 0, 1)


@pytest.fixture(autouse=True)
def no_figures_left() -> Any:
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


# -- tiles ------------------------------------------------------------------------------------------------------------


def test_tiles_stand_where_they_are_said_to() -> None:
    tiles = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    picture, corners = mosaic.tiled(tiles, columns=2, size=12)
    assert len(corners) == 5 and len({y for _, y in corners}) == 3
    for tile, (x, y) in zip(tiles, corners, strict=True):
        assert torch.equal(picture[:, y : y + 8 : 2, x : x + 12 : 2], tile)  # each value a square of two
        assert torch.equal(picture[:, y + 1 : y + 9 : 2, x + 1 : x + 13 : 2], tile)
        assert (picture[:, y - 1, x] == mosaic.FRAME).all()


def test_large_tiles_are_reduced() -> None:
    tiles = torch.rand(1, 3, 400, 200)
    assert mosaic._resized(tiles, 100).shape == (1, 3, 100, 50)
    torch.testing.assert_close(mosaic._resized(tiles, 100).mean(), tiles.mean())


# -- filters ----------------------------------------------------------------------------------------------------------


def test_zero_is_grey_in_colour_pictures_and_white_in_maps() -> None:
    images = torch.zeros(2, 3, 2, 2)
    images[0, 0], images[1, 2] = 0.8, -0.4
    figure, axes = filters(images, colour=True).plot()
    _, corners = mosaic.tiled(torch.zeros(2, 3, 2, 2), 2, 60)
    red, blue = (shown(axes)[:, y + 5, x + 5].tolist() for x, y in corners)
    assert red == pytest.approx([1, 0.5, 0.5]) and blue == pytest.approx([0.5, 0.5, 0.25])
    assert "one scale for all, up to ±0.8; grey is zero" in title(figure)
    figure, axes = filters(images, colour=True, scale="each").plot()
    assert shown(axes)[:, corners[1][1] + 5, corners[1][0] + 5].tolist() == pytest.approx([0.5, 0.5, 0])
    assert "each filter on its own scale" in title(figure)
    figure, axes = filters(torch.tensor([[[[0.0, 2.0, -2.0]]]])).plot()
    x, y = mosaic.tiled(torch.zeros(1, 3, 1, 3), 1, 60)[1][0]
    white, red, blue = (shown(axes)[:, y + 5, x + 5 + 20 * n] for n in range(3))
    assert white.min() > 0.95 and red[0] > red[2] + 0.2 and blue[2] > blue[0] + 0.2
    assert "white is zero" in title(figure)


def test_rows_show_the_strongest_inputs_with_their_numbers() -> None:
    images = torch.zeros(2, 40)
    images[0, 31], images[0, 7], images[1, 3] = -2, 1, 0.5
    figure, axes = filters(images, names=("cat", "dog")).plot()
    found = labels(axes)
    assert found[:2] == ["31", "7"] and found[-2:] == ["cat", "dog"]
    per_row = (len(found) - 2) // 2
    assert found[per_row] == "3"
    assert f"2 rows, each with {per_row} of 40 inputs, by weight; numbers are input channels" in title(figure)
    _, axes = filters(images).plot(most_inputs=3)
    assert labels(axes)[3:] == ["3", "0", "1", "0", "1"]


def test_the_colour_bar_of_maps_is_the_shared_scale() -> None:
    images = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    figure = filters(images).figure()
    (bar,) = [one for one in figure.axes if one.get_label() == "<colorbar>"]
    assert bar.get_ylim() == pytest.approx((-images.abs().max().item(), images.abs().max().item()))
    assert len(filters(images, scale="each").figure().axes) == 1
    assert len(filters(torch.randn(3, 3, 3, 3), colour=True).figure().axes) == 1


def test_many_filters_are_cut_and_that_is_said() -> None:
    figure, axes = filters(torch.randn(300, 1, 3, 3)).plot()
    assert len(labels(axes)) == plots_looking.MOST_FILTERS
    assert "144 of 300 filters" in title(figure)
    figure, axes = filters(torch.randn(30, 9, 3, 3)).plot()
    assert "12 of 30 filters, each with 9 inputs" in title(figure)
    assert len(labels(axes)) == 12 * 9 + 12
    assert "5 of 30 filters" in title(filters(torch.randn(30, 9, 3, 3)).figure(most=5))


def test_expanded_weights_say_what_was_ignored() -> None:
    facts = {"ignored": {"relu": 2, "max_pool2d": 1}, "clipped": True}
    text = title(filters(torch.randn(2, 3, 3, 3), to="conv1", diagnostics=facts).figure())
    assert "conv over conv1" in text
    assert "nonlinearities ignored: relu (2), max_pool2d (1); cut off at the border" in text
    assert "ignored: none" in title(filters(torch.randn(2, 3, 3, 3), to="conv1", diagnostics={}).figure())


# -- activations ------------------------------------------------------------------------------------------------------


def test_each_image_is_a_row_with_a_tile_for_each_channel() -> None:
    maps = torch.rand(2, 5, 4, 5)
    figure, axes = activations(maps, channels=(9, 2, 4, 6, 8)).plot()
    assert axes.shape == (2, 2)
    for row in range(2):
        assert labels(axes[row, 0]) == [] and labels(axes[row, 1]) == ["9", "2", "4", "6", "8"]
    assert title(figure) == "layer4: 5 channels, by number one scale for all maps"
    assert title(activations(maps[:, :1]).figure()).startswith("layer4: channel 0")


def test_one_scale_for_all_maps_or_each_its_own() -> None:
    maps = torch.stack([torch.full((4, 4), 0.1), torch.full((4, 4), 10.0)])[None]
    maps[..., 0, 0] = 0
    found = activations(maps)
    figure, axes = found.plot()
    _, corners = mosaic.tiled(torch.zeros(2, 3, 4, 4), 2, 60)
    weak, strong = (shown(axes[0, 1])[:, y + 50, x + 50] for x, y in corners)
    assert (weak - strong).abs().max() > 0.5
    (bar,) = [one for one in figure.axes if one.get_label() == "<colorbar>"]
    assert bar.get_ylim() == pytest.approx((0, 10))
    figure, axes = found.plot(scale="each")
    weak, strong = (shown(axes[0, 1])[:, y + 50, x + 50] for x, y in corners)
    torch.testing.assert_close(weak, strong)
    assert "each map on its own scale" in title(figure) and len(figure.axes) == 2


def test_the_scale_is_diverging_only_with_negative_values() -> None:
    maps = torch.rand(1, 3, 4, 4)
    for values, low in ((maps, 0), (maps - 0.5, -0.5)):
        (bar,) = [one for one in activations(values).figure().axes if one.get_label() == "<colorbar>"]
        assert bar.get_ylim()[0] == pytest.approx(low, abs=0.1)


def test_a_threshold_shows_the_picture_dark_where_the_channel_is_below() -> None:
    maps = torch.zeros(1, 2, 8, 10)
    maps[0, 1, :4] = 1
    found = activations(maps, channels=(3, 138), thresholds=torch.tensor([0.5, 0.25]), threshold="99% quantile")
    figure, axes = found.plot()
    assert labels(axes[0, 1]) == ["3 > 0.5", "138 > 0.25"]
    assert "bright where the channel exceeds its threshold (99% quantile)" in title(figure)
    _, corners = mosaic.tiled(torch.zeros(2, 3, 32, 40), 2, plots_looking.MASKED)
    (x, y), (right, _) = corners
    assert shown(axes[0, 1])[0, y + 5, x + 5] == pytest.approx(0.125)
    assert shown(axes[0, 1])[0, y + 5, right + 5] == pytest.approx(0.5)
    assert shown(axes[0, 1])[0, y + 90, right + 5] == pytest.approx(0.125)


def test_many_channels_and_images_are_cut_to_the_strongest_and_that_is_said() -> None:
    maps = torch.rand(9, 200, 2, 2)
    maps[4, 150] = 5  # the strongest channel, of an image that is shown
    figure, axes = activations(maps).plot()
    assert len(axes) == plots_looking.MOST_IMAGES
    assert len(labels(axes[0, 1])) == 16 and "150" in labels(axes[0, 1])
    assert list(map(int, labels(axes[0, 1]))) == sorted(map(int, labels(axes[0, 1])))
    assert "16 of 200 channels, by number, those that reach highest" in title(figure)
    assert "6 of 9 images" in title(figure)
    assert len(labels(activations(maps[:1]).plot()[1][0, 1])) == 64
    assert len(labels(activations(maps).plot(most=3, most_images=1)[1][0, 1])) == 3


def test_flat_and_single_pixel_maps_and_odd_names_are_drawn() -> None:
    for maps in (torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 1, 1), -torch.ones(2, 1, 5, 1)):
        for scale in ("shared", "each"):
            assert activations(maps, layer="a$b_$" * 20).figure(scale=scale)
    assert filters(torch.randn(2, 9), names=("a $x^{2}$ class of a very long name", "b"))._repr_png_()


@pytest.mark.parametrize("count", [1, 3, 40, 144])
def test_nothing_drawn_lies_outside_the_figure(count: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    found = [filters(torch.randn(count, 3, 5, 5), colour=True), filters(torch.randn(count, count, 3, 3))]
    found.append(activations(torch.rand(2, count, 6, 6), thresholds=torch.full((count,), 0.123456)))
    found.append(activations(torch.rand(1, count, 6, 6)))
    for one in found:
        figure = one.figure()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        width, height = figure.get_size_inches() * figure.dpi
        texts = [text for axes in figure.axes for text in axes.texts] + [figure._suptitle]
        for text in texts:
            box = text.get_window_extent(canvas.get_renderer())
            inside = box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2
            assert inside, (text.get_text(), box, math.floor(width))
