"""Sobol indices: the estimator against closed forms, a for-loop and scipy; the maps of models whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import sobol_indices
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.baselines import blurred
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.methods.sobol import Designs, first_order, total_order, variance

# -- masks ------------------------------------------------------------------------------------------------------------


def designs(cells: int = 3, n: int = 8, size: tuple[int, int] = (12, 15), seed: int = 0) -> Designs:
    return Designs(cells, n, size, seed, like=torch.zeros(1))


def test_designs_are_two_samples_and_one_with_each_cell_from_the_other() -> None:
    made = designs()
    points = made.points(slice(0, len(made)))
    assert len(made) == 8 * (9 + 2)
    a, b, mixed = points[:8], points[8:16], points[16:].view(9, 8, 9)
    assert not (a == b).any()
    for cell in range(9):
        for column in range(9):
            assert torch.equal(mixed[cell, :, column], (b if column == cell else a)[:, column])


@pytest.mark.parametrize("size", [(12, 15), (7, 10), (3, 3)])
def test_a_mask_is_flat_within_each_cell(size: tuple[int, int]) -> None:
    made = designs(size=size)
    masks, points = made[5:40], made.points(slice(5, 40))
    assert masks.shape == (35, *size)
    for row in range(size[0]):
        for column in range(size[1]):
            cell = row * 3 // size[0] * 3 + column * 3 // size[1]
            assert torch.equal(masks[:, row, column], points[:, cell])


def test_amounts_are_spread_evenly_whatever_the_seed() -> None:
    """Of 2^k points of a Sobol sequence each of 2^k equal intervals holds one, in every dimension."""
    for seed in (0, 1):
        made = designs(n=64, seed=seed)
        for sample in (made.a, made.b):
            assert torch.equal((sample * 64).long().sort(0).values, torch.arange(64)[:, None].expand(64, 9))
    assert not torch.equal(designs(seed=1).a, designs(seed=0).a)


# -- the estimator ----------------------------------------------------------------------------------------------------


def of(function: Callable[[Tensor], Tensor], cells: int, n: int) -> tuple[Tensor, Tensor]:
    """Total and first-order indices of a function of points `[m, d]`, in double precision."""
    made = Designs(cells, n, (cells, cells), 0, like=torch.zeros(1, dtype=torch.float64))
    scores = function(made.points(slice(0, len(made))))[None]
    return total_order(scores, cells**2)[0], first_order(scores, cells**2)[0]


def test_shares_of_a_sum_are_its_squared_weights() -> None:
    weights = torch.tensor([1.0, -2.0, 3.0, 0.0], dtype=torch.float64)
    total, first = of(lambda x: x @ weights + 5, 2, 1024)
    torch.testing.assert_close(total, weights**2 / 14, atol=0.01, rtol=0)
    torch.testing.assert_close(first, weights**2 / 14, atol=0.01, rtol=0)
    assert total[3] == 0


def test_ishigami() -> None:
    """Ishigami and Homma 1990, a = 7 and b = 0.1; the fourth input plays no part."""

    def ishigami(x: Tensor) -> Tensor:
        x = math.pi * (2 * x - 1)
        return x[:, 0].sin() + 7 * x[:, 1].sin() ** 2 + 0.1 * x[:, 2] ** 4 * x[:, 0].sin()

    alone, second, joint = (1 + math.pi**4 / 50) ** 2 / 2, 49 / 8, 8 * 0.01 * math.pi**8 / 225
    whole = alone + second + joint
    total, first = of(ishigami, 2, 4096)
    assert total.tolist() == pytest.approx([(alone + joint) / whole, second / whole, joint / whole, 0], abs=0.01)
    assert first.tolist() == pytest.approx([alone / whole, second / whole, 0, 0], abs=0.01)


def test_the_estimator_is_the_papers_loop_and_scipys() -> None:
    scores = torch.randn(2, 16 * 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for one, total, first, whole in zip(
        scores, total_order(scores, 4), first_order(scores, 4), variance(scores, 4), strict=True
    ):
        a, b, mixed = one[:16], one[16:32], one[32:].view(4, 16)
        assert whole.item() == pytest.approx(np.var(one[:32].numpy()))
        for cell in range(4):
            loop = sum((a[k] - mixed[cell, k]) ** 2 for k in range(16)) / (2 * 16 * whole)
            assert total[cell].item() == pytest.approx(float(loop))
        scipy = sobol_indices(
            func={"f_A": a[None].numpy(), "f_B": b[None].numpy(), "f_AB": mixed[:, None].numpy()}, n=16
        )
        assert total.tolist() == pytest.approx(scipy.total_order.ravel().tolist())
        assert first.tolist() == pytest.approx(scipy.first_order.ravel().tolist())


def test_what_varies_by_rounding_alone_does_not_vary() -> None:
    scores = 1000 + 1e-4 * torch.rand(1, 8 * 6, generator=torch.Generator().manual_seed(0))
    assert total_order(scores, 4).tolist() == [[0] * 4]
    assert first_order(scores, 4).tolist() == [[0] * 4]
    assert total_order(scores.double(), 4).max() > 0.1  # in double precision it is a number like any other


# -- maps -------------------------------------------------------------------------------------------------------------

SIZE = (3, 12, 18)
X = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1)) + 0.5


class Cells(nn.Module):
    """Outputs from the brightness of a grid of 2 x 3 cells: a weighted sum, a product of two, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0, 0.0], [0.0, -3.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 6)[:, 0]  # [N, 2, 3]
        flat = torch.full((len(x),), 2.0).to(x)
        return torch.stack([(cells * self.weight).sum((1, 2)), cells[:, 0, 0] * cells[:, 1, 2], flat], 1)


def explained(target: Any = 0, inputs: Tensor = X, **options: Any) -> tl.Attribution:
    model = tl.wrap(Cells(), input_size=SIZE, classes=["sum", "product", "flat"])
    return tl.explain(model, inputs, target=target, method="sobol", **{"cells": 6, "n_designs": 32, **options})


def test_a_linear_model_is_recovered_cell_by_cell() -> None:
    found = explained(inputs=torch.ones(1, *SIZE), n_designs=512)
    weight = torch.tensor([[1.0, 2.0, 0.0], [0.0, -3.0, 1.0]]).repeat_interleave(3, 0).repeat_interleave(2, 1)
    expected = weight**2 / (weight**2).sum()
    torch.testing.assert_close(found.values[0], expected, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.tensor(found.diagnostics["first_order"])[0], expected, atol=0.03, rtol=0)
    # A cell of the model is the mean of 3 x 2 of ours; each of them is uniform, with a variance of 1/12.
    assert found.diagnostics["variance"] == pytest.approx([(weight**2).sum().item() / 36 / 12], rel=0.05)
    assert found.upsample().shape == (1, 12, 18)


def test_cells_that_work_together_both_count() -> None:
    """Of a product of two uniform numbers 1/7 of the variance belongs to both, 3/7 to each alone."""
    found = explained(1, torch.ones(1, *SIZE), cells=6, n_designs=512, seed=2)
    total, first = found.values[0], torch.tensor(found.diagnostics["first_order"])[0]
    assert total.sum() > first.sum() + 0.05
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[:3, :2] = inside[3:, 4:] = True
    assert total[inside].sum() > 1
    assert total[~inside].abs().max() == 0


def test_a_target_that_does_not_vary_gives_zeros() -> None:
    found = explained("logit:flat")
    assert torch.equal(found.values, torch.zeros(2, 6, 6))
    assert found.diagnostics["variance"] == [0, 0]


@pytest.mark.parametrize("baseline", [0.25, "mean", "blur"])
def test_the_map_is_that_of_explicit_variants(baseline: float | str) -> None:
    """In double precision: the target varies little where cells fade to the mean colour."""
    x, model = X.double(), Cells().double()
    hidden = {0.25: torch.full_like(x, 0.25), "mean": x.mean((2, 3), keepdim=True).expand_as(x), "blur": blurred(x)}
    options: dict[str, Any] = {"cells": 3, "n_designs": 8, "seed": 5, "baseline": baseline}
    found = tl.explain(tl.wrap(model, input_size=SIZE), x, target=1, method="sobol", **options)
    made = Designs(3, 8, (12, 18), 5, like=x)
    masks = made[0 : len(made)][:, None]
    for image, behind, values in zip(x, hidden[baseline], found.values, strict=True):
        with torch.no_grad():
            scores = model(image * masks + behind * (1 - masks))[:, 1]
        torch.testing.assert_close(values, total_order(scores[None], 9).view(3, 3).float())


def test_what_it_costs_and_that_the_batch_size_changes_nothing() -> None:
    first = explained(cells=3, n_designs=8, batch_size=5)
    assert first.forwards == 2 * 8 * (9 + 2) + 2  # and the score of each image
    for batch_size in (1, 64, None):
        again = explained(cells=3, n_designs=8, batch_size=batch_size)
        torch.testing.assert_close(again.values, first.values, atol=1e-5, rtol=1e-4)
    assert (explained(cells=3, n_designs=8, seed=1).values - first.values).abs().max() > 0.01


@pytest.mark.parametrize("target", ["logit:product", "prob:sum", "margin:product", [0, 1]])
def test_another_class_is_answered_as_if_asked_anew(target: Any) -> None:
    found, anew = explained("logit:flat", classes=True).of(target), explained(target)
    torch.testing.assert_close(found.values, anew.values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.scores, anew.scores)
    assert (found.targets, found.forwards) == (anew.targets, 0)
    assert explained(classes=True).outputs.shape == (2, 1 + 32 * 38, 3)
    with pytest.raises(NotApplicable, match="classes=True"):
        anew.of(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_designs": 0}, "power of two.* got 0"),
        ({"n_designs": 1}, "power of two.* got 1"),
        ({"n_designs": 24}, "power of two.* got 24"),
        ({"cells": 0}, "from 1 to 12 .* got 0"),
        ({"cells": 13}, "from 1 to 12 .* got 13"),
        ({"baseline": "grey"}, "got 'grey'"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        explained(**options)
