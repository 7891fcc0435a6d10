"""DeepLIFT and layer-wise relevance propagation: complete and conserving, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum_nets import SIZE, Linear, Net, X, wrapped
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_adapters.captum.deep_lift import _Windows
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle

COLOURS = torch.randn(SIZE, generator=torch.Generator().manual_seed(2)) * 0.5


def stack(*middle: nn.Module, bias: bool = True) -> nn.Sequential:
    """Two convolutions with something between them, pooled and classified by layers alone."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=bias),
        *middle,
        nn.Conv2d(6, 5, 3, padding=1, bias=bias),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4, bias=bias),
    )


class Between(nn.Module):
    """A stack with a function between two of its layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.rest, self.function = nn.Conv2d(3, 6, 3, padding=1), stack()[1:], function

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.rest(self.function(self.first(x)))
        return logits


class Residual(nn.Module):
    """A sum of a layer's input and output, and one ReLU module throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        self.pool, self.fc = nn.MaxPool2d(3, 2, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.relu(self.conv2(self.relu(x - 0.2)) + x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet18() -> Handle:
    torch.manual_seed(0)
    return tl.load("torchvision/resnet18", pretrained=False, input_size=(3, 64, 64))


# -- DeepLIFT ---------------------------------------------------------------------------------------------------------

COMPLETE: dict[str, Callable[[], nn.Module]] = {
    "reused and in place": Net,
    "residual": Residual,
    **{
        str(one): lambda one=one: stack(one)
        for one in (nn.ReLU(), nn.ELU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.MaxPool2d(2))
    },
    "overlapping windows": lambda: stack(nn.MaxPool2d(3, 2, 1)),
    "pooled after a ReLU": lambda: stack(nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, 1)),
    "normalised": lambda: stack(nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.AvgPool2d(2)),
}


@pytest.mark.parametrize("baseline", [None, 0.7, COLOURS])
@pytest.mark.parametrize("build", COMPLETE.values(), ids=COMPLETE)
def test_deep_lift_is_complete(build: Callable[[], nn.Module], baseline: Any) -> None:
    model = wrapped(build())
    start = torch.as_tensor(0.0 if baseline is None else baseline).expand(1, *SIZE)
    for target in ("logit:1", "logit:2-0.5*logit:0"):
        found = tl.explain(model, X, target=target, method="deep_lift", baseline=baseline)
        change = found.scores - model.score(start, target)
        torch.testing.assert_close(found.values.sum((1, 2)), change, atol=2e-5, rtol=1e-4)
        gap = torch.tensor(found.diagnostics["completeness_gap"])
        torch.testing.assert_close(gap, change - found.values.sum((1, 2)), atol=2e-5, rtol=0)
        torch.testing.assert_close(found.scores, model.score(X, target))
        assert found.per_channel is not None
        torch.testing.assert_close(found.per_channel.sum(1), found.values)


def test_deep_lift_against_the_rescale_rule_by_hand() -> None:
    model = wrapped(stack(nn.Tanh(), nn.MaxPool2d(2)))
    conv1, tanh, pool, conv2, _, _, _, fc = model.module

    def layers(x: Tensor) -> list[Tensor]:
        first = conv1(x)
        bent = tanh(first)
        second = conv2(pool(bent))
        return [first, bent, second, second.relu()]

    with torch.no_grad():
        (z, a, u, v), (z0, a0, u0, v0) = layers(X), layers(COLOURS[None])
        through = fc.weight[2][None, :, None, None] / (v.shape[2] * v.shape[3])  # of the mean and the classifier
        through = F.conv_transpose2d(through * (v - v0) / (u - u0), conv2.weight, padding=1)
        peaks, before = pool(a), pool(a0)
        joint = torch.maximum(peaks, before)
        places, places0 = (F.max_pool2d(one, 2, return_indices=True)[1] for one in (a, a0.expand_as(a)))
        share = F.max_unpool2d(through * (joint - before), places, 2) + F.max_unpool2d(
            through * (peaks - joint), places0, 2
        )
        expected = F.conv_transpose2d(share / (a - a0) * (a - a0) / (z - z0), conv1.weight, padding=1) * (X - COLOURS)
    found = tl.explain(model, X, target=2, method="deep_lift", baseline=COLOURS)
    torch.testing.assert_close(found.per_channel, expected, atol=1e-5, rtol=1e-3)


def test_deep_lift_serves_residual_networks() -> None:
    """Captum alone: "module is being used more than once"."""
    model, x = resnet18(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = tl.explain(model, x, target=7, method="deep_lift", baseline=0.3)
    change = found.scores - model.score(torch.full((1, 3, 64, 64), 0.3), 7)
    torch.testing.assert_close(found.values.sum((1, 2)), change, atol=1e-4, rtol=1e-3)
    assert all(type(part).__name__ != "_Separated" for part in model.module.modules())


@pytest.mark.parametrize("target", ["conv2:3", "conv2:5@2,3", "conv1:1+logit:2"])
def test_deep_lift_shares_out_units_of_the_inside(target: str) -> None:
    model = wrapped(Net())
    found = tl.explain(model, X, target=target, method="deep_lift", baseline=0.4)
    change = model.score(X, target) - model.score(torch.full((1, *SIZE), 0.4), target)
    torch.testing.assert_close(found.values.sum((1, 2)), change, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: stack(nn.GELU()), "no rule for GELU"),
        (lambda: stack(nn.ReLU6(), nn.GroupNorm(2, 6)), "no rule for GroupNorm, ReLU6"),
        (lambda: stack(nn.Softmax(1)), "no rule for Softmax"),  # Captum's own depends on the batch
        (lambda: stack(nn.InstanceNorm2d(6)), "no rule for InstanceNorm2d"),
        (lambda: stack(nn.AdaptiveMaxPool2d(4)), "no rule for AdaptiveMaxPool2d"),
        (lambda: Between(F.relu), "no rule for ReLU as a function"),
        (lambda: Between(F.silu), "the shares miss"),
        (lambda: Between(lambda x: x * x.sigmoid()), "the shares miss"),
        (lambda: Between(lambda x: F.max_pool2d(x, 2)), "the shares miss"),
    ],
)
def test_deep_lift_refuses_what_it_has_no_rule_for(build: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(NotApplicable, match=f"{says}.*integrated_gradients"):
        tl.explain(wrapped(build()), X, target=1, method="deep_lift", baseline=COLOURS)


@pytest.mark.parametrize("target", ["prob:1", "margin:1", "logit:0+prob:1"])
def test_deep_lift_refuses_targets_that_bend(target: str) -> None:
    with pytest.raises(NotApplicable, match="shares out logits, channels and neurons"):
        tl.explain(wrapped(Net()), X, target=target, method="deep_lift")


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 1, 1, dilation=2),
        nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d(2, 3, ceil_mode=True),
    ],
    ids=str,
)
def test_windows_side_by_side_pool_to_the_same(pool: nn.MaxPool2d) -> None:
    x = torch.randn(2, 3, 11, 14) - 3
    spread = _Windows(pool)(x)
    torch.testing.assert_close(F.max_pool2d(spread, pool.kernel_size), pool(x), atol=0, rtol=0)


# -- relevance --------------------------------------------------------------------------------------------------------


def test_lrp_of_a_network_of_relus_without_biases_is_the_gradient_times_the_input() -> None:
    model = wrapped(stack(nn.ReLU(), nn.MaxPool2d(3, 2, 1), bias=False))
    for target in ("logit:1", "-0.5*logit:2", "logit:3-2*logit:0"):
        found = tl.explain(model, X, target=target, method="lrp")
        expected = tl.explain(model, X, target=target, method="input_x_gradient")
        torch.testing.assert_close(found.per_channel, expected.per_channel, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.values.sum((1, 2)), found.scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.scores, model.score(X, target))
        assert max(map(abs, found.diagnostics["absorbed"])) < 1e-4


def test_what_lrp_does_not_find_in_pixels_is_in_the_biases() -> None:
    linear = wrapped(nn.Sequential(nn.Flatten(), nn.Linear(240, 4)))
    weight, bias = linear.module[1].weight.detach()[2].view(SIZE), linear.module[1].bias.detach()[2]
    found = tl.explain(linear, X, target=2, method="lrp")
    torch.testing.assert_close(found.per_channel, X * weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(found.diagnostics["absorbed"]), bias.expand(5), atol=1e-4, rtol=1e-4)


CONSERVING: dict[str, Callable[[], nn.Module]] = {
    "biases": lambda: stack(nn.ReLU(), nn.MaxPool2d(2)),
    "normalised": lambda: stack(nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.AvgPool2d(2)),
    "reused": lambda: stack(relu := nn.ReLU(), nn.Conv2d(6, 6, 1), relu, nn.Identity(), nn.Dropout2d()),
    "concatenated": lambda: Between(lambda x: torch.cat([x[:, :3].relu(), F.max_pool2d(x[:, 3:], 3, 1, 1)], 1)),
}


@pytest.mark.parametrize("options", [{}, {"gamma": 0.25}, {"epsilon": 0.01}], ids=str)
@pytest.mark.parametrize("build", CONSERVING.values(), ids=CONSERVING)
def test_relevance_ends_in_pixels_and_biases(build: Callable[[], nn.Module], options: dict[str, float]) -> None:
    model = wrapped(build())
    found = tl.explain(model, X, target=1, method="lrp", **options)  # type: ignore[arg-type]
    absorbed, gap = (torch.tensor(found.diagnostics[name]) for name in ("absorbed", "conservation_gap"))
    torch.testing.assert_close(found.values.sum((1, 2)) + absorbed + gap, found.scores, atol=1e-4, rtol=1e-4)
    assert (gap.abs() <= 0.05 * found.scores.abs()).all()  # gamma moves the signs that functions see
    assert options or gap.abs().max() < 1e-4
    torch.testing.assert_close(found.scores, model.score(X, 1))
    plain = tl.explain(model, X, target=1, method="lrp")
    assert torch.allclose(found.values, plain.values) == (not options)


def test_lrp_gives_the_weights_back_where_they_were() -> None:
    """Captum's gamma rule leaves parameters in other memory, out of reach of an optimiser's views of it."""
    model = wrapped(stack(nn.ReLU()))
    before = [(one, one.data_ptr(), one.detach().clone()) for one in model.module.parameters()]
    tl.explain(model, X, target=1, method="lrp", gamma=0.5)
    for now, (one, place, value) in zip(model.module.parameters(), before, strict=True):
        assert now is one
        assert now.data_ptr() == place
        assert torch.equal(now, value)
    assert not any(hasattr(part, name) for part in model.module.modules() for name in ("rule", "activations"))


def test_lrp_refuses_a_residual_network_with_its_ratio() -> None:
    """Captum alone "succeeds" with a sum of 1e10."""
    with pytest.raises(NotApplicable, match=r"a score of \S+ became \S+e\+\d+ in the pixels.*computes add_ between"):
        tl.explain(resnet18(), torch.randn(1, 3, 64, 64), target=7, method="lrp")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (Residual, "computes add, mean, sub"),
        (lambda: Between(lambda x: F.avg_pool2d(x, 2)), "computes avg_pool2d"),  # conserves, but spreads it evenly
        (lambda: Between(lambda x: x * 2), "computes mul"),
        (lambda: stack(nn.GELU()), "GELU.*has no rule"),
        (lambda: stack(nn.ConvTranspose2d(6, 6, 1)), "ConvTranspose2d.*has no rule"),
        (lambda: stack(same := nn.Conv2d(6, 6, 1), same), "used more than once"),
    ],
)
def test_lrp_refuses_what_it_has_no_rule_for(build: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(NotApplicable, match=f"{says}.*integrated_gradients") as caught:
        tl.explain(wrapped(build()), X, target=1, method="lrp")
    if "rule" in says or "once" in says:
        assert isinstance(caught.value.__cause__, (TypeError, RuntimeError))


@pytest.mark.parametrize("target", ["prob:1", "margin:1", "0:3", "logit:0+0:3"])
def test_lrp_begins_at_logits(target: str) -> None:
    with pytest.raises(NotApplicable, match="sums of logits only"):
        tl.explain(wrapped(stack(nn.ReLU())), X, target=target, method="lrp")


@pytest.mark.parametrize("options", [{"epsilon": -1e-3}, {"gamma": -1.0}])
def test_lrp_refuses_negative_options(options: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="at least 0"):
        tl.explain(wrapped(Linear()), X, target=1, method="lrp", **options)  # type: ignore[arg-type]
