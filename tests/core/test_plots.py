"""Drawings of attributions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from torchloupe_core import plots
from torchloupe_core.results import Attribution, Result

matplotlib.use("Agg")


def attribution(values: Tensor, **changes: Any) -> Attribution:
    facts: dict[str, Any] = {
        "method": "grad_cam",
        "backend": "native",
        "seed": 0,
        "seconds": 0.0,
        "forwards": 1,
        "versions": {},
        "options": {},
        "values": values,
        "images": torch.full((len(values), 3, 8, 10), 0.5),
        "scores": torch.full((len(values),), 1.25),
        "target": "logit:dog",
        "layer": "layer4",
    }
    return Attribution(**{**facts, **changes})


SIGNED = torch.tensor([[[-2.0, 0.0, 0.0, 1.0]]])
POSITIVE = torch.tensor([[[0.0, 0.5, 1.0, 2.0]]])


@pytest.fixture(autouse=True)
def no_figures_left() -> Any:
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def test_signed_colours_are_centred_on_zero() -> None:
    red, green, blue = plots.colours(SIGNED[0], True)[:, 0].unbind(0)  # four colours each
    middle = torch.tensor(matplotlib.colormaps["RdBu_r"](0.5)[:3])
    for index in (1, 2):  # zero is the neutral middle although the values reach further down than up
        torch.testing.assert_close(
            torch.stack([red[index], green[index], blue[index]]), middle.float(), atol=0.02, rtol=0
        )
    assert blue[0] > red[0]  # evidence against is blue
    assert red[3] > blue[3]  # evidence for is red
    low, high = plots.scale(SIGNED[0], True)
    assert low == -high


def test_positive_maps_use_a_perceptually_uniform_map() -> None:
    found = plots.colours(torch.linspace(0, 2, 100)[None], False)[:, 0, :90:10]
    brightness = found.mean(0)
    assert (brightness.diff() > 0).all()
    torch.testing.assert_close(found[:, 0], torch.tensor(matplotlib.colormaps["viridis"](0.0)[:3]).float())


@pytest.mark.parametrize("values", [torch.zeros(2, 3, 4), torch.ones(2, 3, 4), -torch.ones(2, 3, 4)])
def test_a_flat_map_can_be_drawn(values: Tensor) -> None:
    drawn = attribution(values).overlay()
    assert drawn.isfinite().all()
    torch.testing.assert_close(drawn, drawn[:, :, :1, :1].expand_as(drawn))  # one colour, but for rounding
    assert attribution(values)._repr_png_()


def test_which_maps_count_as_signed() -> None:
    assert plots.is_signed(attribution(SIGNED))
    assert not plots.is_signed(attribution(SIGNED, signed=False))
    assert not plots.is_signed(attribution(POSITIVE))


def test_an_overlay_is_a_picture_of_the_images_size() -> None:
    for values in (SIGNED, POSITIVE):
        for alpha in (0.0, 0.6, 1.0):
            drawn = attribution(values).overlay(alpha=alpha)
            assert drawn.shape == (1, 3, 8, 10)
            assert 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(attribution(POSITIVE).overlay(alpha=0.0), torch.full((1, 3, 8, 10), 0.5))
    faint = attribution(SIGNED).overlay()[0]
    torch.testing.assert_close(faint[:, 4, 5], torch.full((3,), 0.5), atol=0.1, rtol=0)  # zero lets the image through
    assert (faint[:, 4, 0] - 0.5).abs().max() > 0.15


def test_one_extreme_pixel_leaves_the_rest_visible() -> None:
    values = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
    values[0, 0, 0] = 1000
    assert plots.scale(values[0], False)[1] < 2


def test_plot_returns_figure_and_axes() -> None:
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figure, axes = attribution(torch.rand(3, 2, 2)).plot()
    assert isinstance(figure, Figure)
    assert axes.shape == (3, 2)
    assert figure.number in plt.get_fignums()
    left, right = (one.get_title(loc="left") for one in axes[0])
    assert left == "logit:dog\n= 1.25"
    assert right == "grad_cam\nat layer4"
    assert attribution(POSITIVE, layer=None).plot()[1][0, 1].get_title(loc="left").endswith("at the input")


def test_the_colour_bar_is_symmetric_for_signed_maps() -> None:
    figure = attribution(SIGNED).figure()
    bar = next(one for one in figure.axes if one.get_label() == "<colorbar>")
    low, high = bar.get_ylim()
    assert low == -high < 0


def test_a_long_or_mathematical_name_is_drawn_as_text() -> None:
    found = attribution(POSITIVE, target='logit:"a $x^{2}$ class" ' + "+ layer4:17" * 20, layer="a$b_$" * 30)
    axes = found.plot()[1]
    for one in axes[0]:
        assert max(map(len, one.get_title(loc="left").split("\n"))) < 60
    assert found._repr_png_()


def test_many_images_are_cut_and_that_is_said() -> None:
    figure, axes = attribution(torch.rand(30, 2, 2)).plot()
    assert len(axes) == plots.MOST_ROWS
    assert figure._supxlabel.get_text() == f"{plots.MOST_ROWS} of 30 images"
    assert len(attribution(torch.rand(30, 2, 2)).plot(most=2)[1]) == 2


def test_notebooks_and_files_get_a_png_without_pyplot(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    found = attribution(SIGNED)
    with Image.open(io.BytesIO(found._repr_png_())) as image:
        assert image.format == "PNG"
        picture = np.asarray(image.convert("RGB"))
    assert picture.std() > 10
    found.figure().savefig(tmp_path / "one.pdf")
    assert (tmp_path / "one.pdf").stat().st_size > 1000
    assert plt.get_fignums() == []


def test_a_result_without_a_drawing_says_so() -> None:
    class Bare(Result):
        pass

    try:
        with pytest.raises(TypeError, match="Bare has no drawing"):
            Bare("m", "native", 0, 0.0, 0, {}, {}).plot()
    finally:
        del Result.kinds["Bare"]
