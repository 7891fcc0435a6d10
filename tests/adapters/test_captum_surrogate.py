"""LIME and Kernel SHAP, on functions whose answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from captum_nets import SIZE, Linear, Net, X, quarters, wrapped
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle


@pytest.fixture(scope="module")
def linear() -> Handle:
    return wrapped(Linear())


@pytest.fixture(scope="module")
def net() -> Handle:
    return wrapped(Net())


def test_lime_recovers_a_function_linear_in_the_segments(linear: Handle) -> None:
    weight = linear.module.fc.weight.detach()[1].view(SIZE)
    effect = (X[:2] * weight).sum(1)
    segments = quarters()
    found = tl.explain(linear, X[:2], target=1, method="lime", segments=segments, n_samples=600)
    for label in segments.unique():
        inside = segments == label
        values = found.values[:, inside]
        assert (values == values[:, :1]).all()  # one weight for a segment
        torch.testing.assert_close(values[:, 0], effect[:, inside].sum(1), atol=0.12, rtol=0.05)
    assert min(found.diagnostics["r2"]) > 0.99


def test_lime_is_reproducible_by_its_seed(net: Handle) -> None:
    first = tl.explain(net, X[:1], target=1, method="lime", segments=quarters(), n_samples=30, seed=3)
    torch.manual_seed(99)
    again = tl.explain(net, X[:1], target=1, method="lime", segments=quarters(), n_samples=30, seed=3, batch_size=1)
    torch.testing.assert_close(first.values, again.values, atol=1e-5, rtol=1e-4)
    other = tl.explain(net, X[:1], target=1, method="lime", segments=quarters(), n_samples=30, seed=4)
    assert not torch.allclose(first.values, other.values)


def test_segments_may_have_any_numbers(net: Handle) -> None:
    few, large = (
        tl.explain(net, X[:1], target=1, method="lime", segments=numbers, n_samples=30).values
        for numbers in (quarters().unique(return_inverse=True)[1], quarters() * 1000 - 5)
    )
    assert torch.equal(few, large)


def test_lime_says_how_well_it_fits(net: Handle) -> None:
    xor = nn.Sequential(Xor())
    found = tl.explain(
        tl.wrap(xor, input_size=SIZE), torch.ones(1, *SIZE), target=0, method="lime", segments=quarters(), n_samples=400
    )
    assert found.diagnostics["r2"][0] < 0.8


class Xor(nn.Module):
    """One if exactly one of two quarters is there; if the first is; if both are. No sum says the outer two."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = (x[:, 0, 0, 0] > 0.5).float(), (x[:, 0, -1, -1] > 0.5).float()
        return torch.stack([a + b - 2 * a * b, a, a * b], 1)


def test_lime_takes_segments_for_each_image_and_cuts_its_own(net: Handle) -> None:
    each = torch.stack([quarters(), quarters().flip(0)])
    found = tl.explain(net, X[:2], target=1, method="lime", segments=each, n_samples=20)
    alone = tl.explain(net, X[1:2], target=1, method="lime", segments=each[1], n_samples=20)
    torch.testing.assert_close(found.values[1], alone.values[0], atol=1e-5, rtol=1e-4)
    own = tl.explain(net, X[:1], target=1, method="lime", n_samples=20, n_segments=4)
    assert 2 <= len(own.values.unique()) <= 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"segments": torch.zeros(4, 4, dtype=torch.long)}, r"\[5, 8, 10\]; got \[5, 4, 4\]"),
        ({"segments": torch.zeros(2, 8, 10, dtype=torch.long)}, r"got \[2, 8, 10\]"),
        ({"segments": torch.zeros(8, 10)}, "integers"),
        ({"n_samples": 1}, "at least 2 samples"),
        ({"n_segments": 1}, "n_segments of at least 2"),
    ],
)
def test_lime_refuses_senseless_options(net: Handle, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        tl.explain(net, X, method="lime", **options)


# -- Kernel SHAP ------------------------------------------------------------------------------------------------------


def shapley_values(model: Handle, x: Tensor, target: Any, filling: float = 0.0) -> tuple[Tensor, Tensor]:
    """The exact Shapley value of each quarter by enumeration of all orders, and the target for the baseline."""
    labels = quarters().unique()
    worth = {}
    for count in range(len(labels) + 1):
        for chosen in itertools.combinations(range(len(labels)), count):
            inside = torch.isin(quarters(), labels[list(chosen)])
            worth[frozenset(chosen)] = model.score(torch.where(inside, x, filling)[None], target)[0]
    values = torch.zeros(len(labels))
    orders = list(itertools.permutations(range(len(labels))))
    for order in orders:
        for place, label in enumerate(order):
            values[label] += worth[frozenset(order[: place + 1])] - worth[frozenset(order[:place])]
    return values / len(orders), worth[frozenset()]


def of_quarters(values: Tensor) -> Tensor:
    """The value of each quarter in a map that is constant on each."""
    found = []
    for label in quarters().unique():
        inside = values[quarters() == label]
        assert (inside == inside[0]).all()
        found.append(inside[0])
    return torch.stack(found)


def test_kernel_shap_is_exact_where_the_target_is_a_sum_over_segments(linear: Handle) -> None:
    effect = (X[:2] * linear.module.fc.weight.detach()[1].view(SIZE)).sum(1)
    found = tl.explain(linear, X[:2], target=1, method="kernel_shap", segments=quarters(), n_samples=60)
    for label in quarters().unique():
        inside = quarters() == label
        expected = effect[:, inside].sum(1)[:, None].expand(-1, int(inside.sum()))
        torch.testing.assert_close(found.values[:, inside], expected, atol=1e-3, rtol=1e-3)
    assert min(found.diagnostics["r2"]) > 0.9999
    torch.testing.assert_close(found.scores, linear.score(X[:2], 1))
    assert found.forwards == 2 * 60


@pytest.mark.parametrize("target", ["logit:2", "prob:1", "conv2:3"])
def test_kernel_shap_approaches_the_exact_shapley_values(net: Handle, target: str) -> None:
    exact, empty = shapley_values(net, X[0], target, filling=0.2)
    found = tl.explain(
        net, X[:1], target=target, method="kernel_shap", segments=quarters(), n_samples=4000, baseline=0.2
    )
    values = of_quarters(found.values[0])
    torch.testing.assert_close(values, exact, atol=0.03 * exact.abs().max().item(), rtol=0)
    torch.testing.assert_close(values.sum(), found.scores[0] - empty, atol=1e-3 * exact.abs().max().item(), rtol=0)


def test_kernel_shap_says_how_well_a_sum_fits() -> None:
    model = tl.wrap(nn.Sequential(Xor()), input_size=SIZE)
    found = tl.explain(model, torch.ones(1, *SIZE), target=0, method="kernel_shap", segments=quarters(), n_samples=800)
    assert found.diagnostics["r2"][0] < 0.3
    both = tl.explain(model, torch.ones(1, *SIZE), target=2, method="kernel_shap", segments=quarters(), n_samples=800)
    assert found.diagnostics["r2"][0] < both.diagnostics["r2"][0] < 0.9  # though the whole image is fitted exactly
    assert of_quarters(found.values[0]).abs().max() < 0.1  # each order gains as much as it loses


def test_kernel_shap_is_reproducible_by_its_seed(net: Handle) -> None:
    options: dict[str, Any] = {"target": 1, "method": "kernel_shap", "segments": quarters(), "n_samples": 20}
    first = tl.explain(net, X[:2], seed=3, **options)
    torch.manual_seed(99)
    again = tl.explain(net, X[1:2], seed=3, batch_size=3, **options)
    torch.testing.assert_close(first.values[1:], again.values, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first.values, tl.explain(net, X[:2], seed=4, **options).values)


@pytest.mark.parametrize(
    "options",
    [{"segments": quarters(), "n_samples": 5}, {"segments": torch.zeros(8, 10, dtype=torch.long), "n_samples": 50}],
)
def test_kernel_shap_refuses_too_few_samples_or_segments(net: Handle, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="at least 2 segments, and 2 samples more than segments"):
        tl.explain(net, X[:1], target=0, method="kernel_shap", **options)
