"""Gradients, path integrals and averages over noise, against hand-written gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum_nets import SIZE, Linear, Net, X, gradient, wrapped
from torch import Tensor
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle


@pytest.fixture(scope="module")
def linear() -> Handle:
    return wrapped(Linear())


@pytest.fixture(scope="module")
def net() -> Handle:
    return wrapped(Net())


def test_saliency_of_any_target_is_its_gradient(net: Handle) -> None:
    conv1 = lambda m, x: F.conv2d(x, m.conv1.weight, m.conv1.bias, padding=1)  # noqa: E731
    values: dict[str, Any] = {
        "logit:2": lambda m, x: m(x)[:, 2],
        "prob:1": lambda m, x: m(x).softmax(1)[:, 1],
        "margin:3": lambda m, x: m(x)[:, 3] - m(x)[:, :3].amax(1),
        "conv1:4": lambda m, x: conv1(m, x)[:, 4].mean((1, 2)),
        "conv1:4@3,5": lambda m, x: conv1(m, x)[:, 4, 3, 5],
        "conv1": lambda m, x: conv1(m, x).square().mean((1, 2, 3)),
    }
    for text, value in values.items():
        found = tl.explain(net, X, target=text, method="saliency")
        expected = gradient(net, X, value)
        torch.testing.assert_close(found.per_channel, expected, msg=lambda m, t=text: f"{t}: {m}")
        torch.testing.assert_close(found.values, expected.abs().amax(1))


def test_the_saliency_of_a_sum_comes_from_the_sum_of_the_gradients(net: Handle) -> None:
    parts = [
        weight * tl.explain(net, X, target=target, method="saliency").per_channel
        for weight, target in ((1, "logit:1"), (-0.5, "conv2:3"), (2, "conv1:0@2,2"))
    ]
    whole = tl.explain(net, X, target="logit:1-0.5*conv2:3+2*conv1:0@2,2", method="saliency")
    torch.testing.assert_close(whole.per_channel, sum(parts))
    torch.testing.assert_close(whole.values, sum(parts).abs().amax(1))


@pytest.mark.parametrize("target", ["logit:1", "conv2:3", "margin:0"])
def test_integrated_gradients_are_complete(net: Handle, target: str) -> None:
    found = tl.explain(net, X, target=target, method="integrated_gradients", steps=300)
    zero = net.score(torch.zeros(1, *SIZE), target)
    gap = torch.tensor(found.diagnostics["completeness_gap"])
    assert gap.shape == (5,)
    torch.testing.assert_close(found.scores - zero - found.values.sum((1, 2)), gap, atol=1e-4, rtol=0)
    assert gap.abs().max() < 0.01 * (found.scores - zero).abs().max()
    rough = tl.explain(net, X, target=target, method="integrated_gradients", steps=2).diagnostics["completeness_gap"]
    assert torch.tensor(rough).abs().max() > gap.abs().max()


def test_integrated_gradients_against_a_riemann_sum(net: Handle) -> None:
    found = tl.explain(net, X, target=2, method="integrated_gradients", steps=200).values
    total = torch.zeros_like(X)
    for step in range(400):
        total += gradient(net, X * (step + 0.5) / 400, lambda m, x: m(x)[:, 2]) / 400
    torch.testing.assert_close(found, (X * total).sum(1), atol=2e-2 * found.abs().max().item(), rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_changes_nothing(net: Handle, batch_size: int) -> None:
    for method in ("integrated_gradients", "saliency", "guided_backprop"):
        first = tl.explain(net, X, target=2, method=method)
        again = tl.explain(net, X, target=2, method=method, batch_size=batch_size)
        torch.testing.assert_close(first.values, again.values, atol=1e-5, rtol=1e-4)
    with pytest.raises(BadInput, match="at least 1 step"):
        tl.explain(net, X, method="integrated_gradients", steps=0)


# -- averages over noise ----------------------------------------------------------------------------------------------


def noisy_gradients(model: Handle, x: Tensor, n: int, share: float, seed: int = 0) -> Tensor:
    """The gradient at each of n noisy copies of one image."""
    torch.manual_seed(seed)
    noise = torch.normal(0.0, torch.full((n, *SIZE), share * float(x.max() - x.min())))
    return torch.stack([gradient(model, (x + one)[None], lambda m, x: m(x)[:, 2])[0] for one in noise])


def test_smooth_grad_and_var_grad_against_a_loop_over_the_same_noise(net: Handle) -> None:
    options: dict[str, Any] = {"target": 2, "n_samples": 7, "noise": 0.2, "seed": 3}
    smooth = tl.explain(net, X[:2], method="smooth_grad", **options)
    spread = tl.explain(net, X[:2], method="var_grad", **options)
    for index in range(2):
        found = noisy_gradients(net, X[index], 7, 0.2, seed=3)
        assert smooth.per_channel is not None
        assert spread.per_channel is not None
        torch.testing.assert_close(smooth.per_channel[index], found.mean(0))
        torch.testing.assert_close(spread.per_channel[index], found.var(0, correction=0), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(smooth.values[index], found.mean(0).abs().amax(0))
        torch.testing.assert_close(spread.values[index], found.var(0, correction=0).amax(0), atol=1e-6, rtol=1e-4)
    assert smooth.forwards == 2 * 7 + 2


def test_noise_changes_nothing_where_the_gradient_is_the_same_everywhere() -> None:
    linear = wrapped(Linear())
    weight = linear.module.fc.weight.detach()[1].view(SIZE)
    smooth = tl.explain(linear, X, target=1, method="smooth_grad", n_samples=4)
    assert smooth.per_channel is not None
    torch.testing.assert_close(smooth.per_channel, weight.expand(5, *SIZE))
    spread = tl.explain(linear, X, target=1, method="var_grad", n_samples=7).values
    assert (spread >= 0).all()
    assert spread.max() < 1e-6


@pytest.mark.parametrize("method", ["smooth_grad", "var_grad", "gradient_shap"])
def test_samples_do_not_depend_on_the_batch(net: Handle, method: str) -> None:
    """Nor on the state of the callers' generators, which stay where they were."""
    first = tl.explain(net, X, target=2, method=method, n_samples=7)
    for batch_size in (1, 3, 64):
        torch.manual_seed(batch_size)
        state = torch.get_rng_state()
        again = tl.explain(net, X[2:4], target=2, method=method, n_samples=7, batch_size=batch_size)
        torch.testing.assert_close(first.values[2:4], again.values, atol=1e-6, rtol=1e-4)
        assert torch.equal(state, torch.get_rng_state())
    other = tl.explain(net, X, target=2, method=method, n_samples=7, seed=1)
    assert not torch.allclose(first.values, other.values)


def test_more_samples_than_fit_are_differentiated_batch_by_batch(net: Handle) -> None:
    """No more rows at once than the batch size, and what is kept of each is its gradient."""
    sizes = []
    with net.borrow():
        net.module.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
        tl.explain(net, X[:1], target=2, method="smooth_grad", n_samples=11, batch_size=4)
    assert sizes == [4, 4, 3, 1]


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("smooth_grad", {"n_samples": 0}, "n_samples at least 1"),
        ("smooth_grad", {"noise": 0.0}, "noise is above 0"),
        ("var_grad", {"n_samples": 1}, "at least 2 samples"),
        ("gradient_shap", {"n_samples": 0}, "at least 1 sample"),
        ("gradient_shap", {"baseline": torch.zeros(2, 3, 4, 4)}, r"\[M, C, H, W\]"),
        ("gradient_shap", {"baseline": torch.zeros(0, *SIZE)}, r"\[M, C, H, W\]"),
        ("gradient_shap", {"baseline": torch.zeros(4, 8, 10)}, r"\[C, H, W\]"),
    ],
)
def test_senseless_sampling_is_refused(net: Handle, method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        tl.explain(net, X[:1], target=0, method=method, **options)


# -- expected gradients -----------------------------------------------------------------------------------------------

COLOURS = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(2)) * 0.3


def test_gradient_shap_is_captums_own_of_the_bare_model(net: Handle) -> None:
    from captum.attr import GradientShap

    found = tl.explain(
        net, X[:2], target=1, method="gradient_shap", n_samples=9, baseline=COLOURS, batch_size=4, seed=5
    )
    net.module.eval()
    for index in range(2):
        torch.manual_seed(5)
        np.random.seed(5)
        expected = GradientShap(net.module).attribute(X[index, None], COLOURS, n_samples=9, target=1).detach()
        assert found.per_channel is not None
        torch.testing.assert_close(found.per_channel[index, None], expected)
        torch.testing.assert_close(found.values[index], expected[0].sum(0))


def test_gradient_shap_on_a_linear_model_needs_one_sample() -> None:
    linear = wrapped(Linear())
    weight = linear.module.fc.weight.detach()[1].view(SIZE)
    found = tl.explain(linear, X, target=1, method="gradient_shap", n_samples=1, baseline=0.5)
    torch.testing.assert_close(found.per_channel, (X - 0.5) * weight, atol=1e-5, rtol=1e-4)
    assert max(map(abs, found.diagnostics["completeness_gap"])) < 1e-4


def test_gradient_shap_is_complete_in_expectation(net: Handle) -> None:
    gaps = {}
    for n_samples in (10, 3000):
        found = tl.explain(net, X[:2], target=1, method="gradient_shap", n_samples=n_samples, baseline=COLOURS)
        gaps[n_samples] = torch.tensor(found.diagnostics["completeness_gap"])
        change = found.scores - net.score(COLOURS, 1).mean()
        torch.testing.assert_close(change - found.values.sum((1, 2)), gaps[n_samples], atol=1e-4, rtol=0)
    assert gaps[3000].abs().max() < 0.03 * change.abs().max()
    assert gaps[3000].abs().max() < gaps[10].abs().max()
