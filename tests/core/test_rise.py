"""RISE: its masks against torch's own interpolation, and the maps of models whose answer is known."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.methods import rise as module
from torchloupe_core.methods.rise import RandomMasks


def masks(n: int, cells: int = 7, p: float = 0.5, size: tuple[int, int] = (32, 48), seed: int = 0) -> RandomMasks:
    return RandomMasks(n, cells, p, size, torch.Generator().manual_seed(seed), like=torch.zeros(1))


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "size"), [(7, (32, 48)), (7, (224, 224)), (3, (10, 7)), (1, (8, 8)), (8, (5, 5))])
def test_masks_are_the_enlarged_and_shifted_grids(cells: int, size: tuple[int, int]) -> None:
    made = masks(12, cells, size=size)
    found = made[0:12]
    assert len(made) == 12
    assert found.shape == (12, *size)
    cell = [math.ceil(length / cells) for length in size]
    enlarged = F.interpolate(
        made._grids[:, None].float(), [(cells + 1) * one for one in cell], mode="bilinear", align_corners=False
    )[:, 0]
    for index in range(12):
        row, column = (int(shift[index]) for shift in made._shifts)
        assert 0 <= row < cell[0]
        assert 0 <= column < cell[1]
        expected = enlarged[index, row : row + size[0], column : column + size[1]]
        torch.testing.assert_close(found[index], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_masks_are_p_at_every_pixel_on_average(p: float) -> None:
    made = masks(20_000, 4, p, (12, 16))
    mean = torch.cat([made[start : start + 1000] for start in range(0, 20_000, 1000)]).mean(0)
    # The standard error of a Bernoulli mean is at most 0.0035; interpolated cells vary less.
    torch.testing.assert_close(mean, torch.full((12, 16), p), atol=5 * 0.0035, rtol=0)


def test_shifts_are_uniform_over_a_cell() -> None:
    made = masks(20_000, 7, size=(32, 48))  # cells of 5 x 7
    for shift, cell in zip(made._shifts, (5, 7), strict=True):
        counts = torch.bincount(shift, minlength=cell)
        assert len(counts) == cell
        assert (counts - 20_000 / cell).abs().max() < 5 * (20_000 / cell) ** 0.5


def test_masks_do_not_depend_on_how_they_are_sliced() -> None:
    made = masks(20)
    whole = made[0:20]
    torch.testing.assert_close(torch.cat([made[0:3], made[3:4], made[4:20]]), whole, atol=1e-6, rtol=0)
    assert torch.equal(masks(20)[0:20], whole)
    assert not torch.equal(masks(20, seed=1)[0:20], whole)
    assert whole.min() >= 0
    assert whole.max() <= 1 + 1e-6


# -- maps -------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Two outputs linear in the pixels: weights, and a constant."""

    def __init__(self, size: tuple[int, int] = (16, 24), constant: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        coarse = torch.randn(1, 1, 3, 4, generator=generator)
        smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)[0, 0]
        self.weight, self.constant = nn.Parameter(smooth / 100), constant

    def forward(self, x: Tensor) -> Tensor:
        first = (x.sum(1) * self.weight).sum((1, 2))
        return torch.stack([first, torch.full_like(first, self.constant)], 1)


SIZE = (3, 16, 24)
X = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1)) + 0.5


def asked(constant: float = 0.0) -> Handle:
    return tl.wrap(Linear(constant=constant), input_size=SIZE)


def explained(target: Any, *, constant: float = 0.0, n_masks: int = 2000, **options: Any) -> tl.Attribution:
    return tl.explain(asked(constant), X, target=target, method="rise", n_masks=n_masks, **options)


def test_a_constant_model_gives_that_constant_and_zero_gives_zero() -> None:
    found = explained(1, constant=3.0, cells=4).values
    assert found.shape == (2, 16, 24)
    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=0.3, rtol=0)
    assert abs(found.mean().item() - 3) < 0.05
    assert torch.equal(explained(1).values, torch.zeros(2, 16, 24))


def test_the_map_is_equation_6_over_explicit_masks() -> None:
    found = explained(0, n_masks=50, cells=3, p=0.4, seed=7).values
    made = RandomMasks(50, 3, 0.4, (16, 24), torch.Generator().manual_seed(7), like=X)[0:50]
    model = Linear()
    expected = torch.zeros(2, 16, 24)
    for image in range(2):
        for mask in made:
            with torch.no_grad():
                expected[image] += model(X[image : image + 1] * mask)[0, 0] * mask / (50 * 0.4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_linear_model_is_recovered() -> None:
    """Pixel by pixel the covariance with a linear model follows its weights, blurred by the masks."""
    ones = torch.ones(1, *SIZE)
    found = tl.explain(asked(), ones, target=0, method="rise", n_masks=4000, cells=6).values[0]
    weight = asked().module.weight.detach()
    correlation = torch.corrcoef(torch.stack([found.flatten(), weight.flatten()]))[0, 1]
    assert correlation > 0.9


def test_the_seed_decides_and_the_batch_size_does_not() -> None:
    first = explained(0, n_masks=100, seed=3, batch_size=7)
    for batch_size in (1, 64, 100, None):
        again = explained(0, n_masks=100, seed=3, batch_size=batch_size)
        torch.testing.assert_close(again.values, first.values, atol=1e-5, rtol=1e-4)
    assert (explained(0, n_masks=100, seed=4).values - first.values).abs().max() > 0.01
    assert first.seed == 3
    assert first.options == {"n_masks": 100, "cells": 7, "p": 0.5, "baseline": 0.0}
    assert 200 <= first.forwards <= 204  # and the score of each image


def test_each_image_is_explained_as_if_alone() -> None:
    both = explained(["logit:0", "margin:0"], n_masks=60, constant=2.0)
    for index, target in enumerate(("logit:0", "margin:0")):
        model = asked(constant=2.0)
        alone = tl.explain(model, X[index], target=target, method="rise", n_masks=60)
        torch.testing.assert_close(both.values[index], alone.values[0], atol=1e-5, rtol=1e-4)


def test_margin_is_the_difference_of_two_maps() -> None:
    margin = explained("margin:0", constant=2.0, n_masks=60).values
    difference = explained("logit:0-logit:1", constant=2.0, n_masks=60).values
    torch.testing.assert_close(margin, difference)


def test_covered_pixels_become_the_baseline() -> None:
    colour = torch.tensor([0.1, 0.2, 0.3])[:, None, None].expand(SIZE)
    shown = tl.explain(asked(), colour, target=0, method="rise", n_masks=40, baseline=colour)
    made = RandomMasks(40, 7, 0.5, (16, 24), torch.Generator().manual_seed(0), like=X)[0:40]
    with torch.no_grad():
        value = Linear()(colour[None])[0, 0]  # nothing changes, whatever is covered
    torch.testing.assert_close(shown.values[0], value * made.sum(0) / 20, atol=1e-5, rtol=1e-4)
    half = tl.explain(asked(), X[:1], target=0, method="rise", n_masks=40, baseline=0.5).values
    assert not torch.allclose(half, tl.explain(asked(), X[:1], target=0, method="rise", n_masks=40).values)


def test_masks_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    enlarge, most = RandomMasks.__getitem__, 0

    def counted(self: RandomMasks, chosen: slice) -> Tensor:
        nonlocal most
        slice_of_masks = enlarge(self, chosen)
        made.append(weakref.ref(slice_of_masks))
        most = max(most, sum(len(one) for ref in made if (one := ref()) is not None))
        return slice_of_masks

    monkeypatch.setattr(module.RandomMasks, "__getitem__", counted)
    explained(0, n_masks=500, batch_size=5)
    assert len(made) == 100
    assert most <= 10  # a batch, and the one before it until it is replaced


def test_half_precision_models_do_not_lose_the_sum() -> None:
    found = explained(1, constant=3.0, cells=4, dtype=torch.bfloat16, batch_size=2, n_masks=1500).values
    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=0.3, rtol=0)


@pytest.mark.parametrize("options", [{"n_masks": 0}, {"cells": 0}, {"p": 0.0}, {"p": 1.0}, {"p": -1}])
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="rise needs"):
        explained(0, **{"n_masks": 4, **options})


def test_a_baseline_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="baseline"):
        explained(0, n_masks=4, baseline=torch.zeros(2, 5, 5))
