"""shap: Owen values of halved regions, where they are known. The first compiles for some seconds."""

from __future__ import annotations

import logging
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl

pytest.importorskip("shap")

pytestmark = pytest.mark.slow


class Sum(nn.Module):
    """A weighed sum of pixels, and its square."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        total = (x * self.weight).sum((1, 2, 3))
        return torch.stack([total, total.square()], 1)


X = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model() -> tl.Handle:
    return tl.wrap(Sum(), input_size=(2, 4, 4))


@pytest.mark.parametrize("baseline", [0.0, 1.5])
def test_shares_of_a_sum_are_its_terms(model: tl.Handle, baseline: float) -> None:
    found = tl.explain(model, X, target=0, method="shap.partition", max_evals=2000, baseline=baseline)
    expected = ((X - baseline) * model.module.weight.detach()).sum(1)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)


def test_shares_of_anything_add_up_at_any_budget(model: tl.Handle) -> None:
    for budget in (4, 20, 100):
        found = tl.explain(model, X, target=1, method="shap.partition", max_evals=budget, baseline="mean")
        assert max(map(abs, found.diagnostics["completeness_gap"])) < 1e-4
    with pytest.raises(tl.errors.BadInput, match="max_evals"):
        tl.explain(model, X, target=1, method="shap.partition", max_evals=3)


def test_the_first_halves_share_by_shapleys_formula(model: tl.Handle) -> None:
    """Of nothing, of all and of each half: a half gets the mean of what it adds to nothing and to the other."""
    found = tl.explain(model, X[:1], target=1, method="shap.partition", max_evals=4).values[0]
    halves = [torch.zeros(4, 4), torch.zeros(4, 4)]
    halves[0][:2], halves[1][2:] = 1, 1  # rows are split first
    none, first, second, both = (
        float(model.module(X[:1] * mask)[0, 1].detach()) for mask in (0 * halves[0], *halves, halves[0] + halves[1])
    )
    expected = [(first - none + both - second) / 2, (second - none + both - first) / 2]
    torch.testing.assert_close(torch.stack([found[:2].sum(), found[2:].sum()]), torch.tensor(expected))
    assert found[:2].unique().numel() == found[2:].unique().numel() == 1  # evenly


def test_the_process_is_as_it_was(model: tl.Handle, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> tuple[object, ...]:
        return (
            list(warnings.filters),
            dict(mpl.rcParams),
            np.geterr(),
            list(logging.getLogger().handlers),
            torch.get_num_threads(),
            np.random.get_state()[2],
        )

    before = state()
    tl.explain(model, X, target=0, method="shap.partition", max_evals=40, progress=False)
    assert state() == before
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
