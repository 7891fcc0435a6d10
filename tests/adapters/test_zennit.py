"""zennit's composites against explicit sums, against zennit as its users call it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.specimens import SPECIMENS

pytest.importorskip("zennit")


class Small(nn.Module):
    """One convolution, ReLU and mean by functions, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


X = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def relevance(model: tl.Handle, inputs: Tensor, composite: str, **options: Any) -> Tensor:
    found = tl.explain(model, inputs, method=f"zennit.{composite}", **options)
    assert found.per_channel is not None
    torch.testing.assert_close(found.values, found.per_channel.sum(1))
    return found.per_channel


@pytest.mark.parametrize("biases", [True, False])
def test_epsilon_plus_against_a_loop(biases: bool) -> None:
    """By hand: epsilon in the linear layer, in proportion in the mean, z-plus in the convolution."""
    model, label = tl.wrap(Small().eval(), input_size=(2, 6, 6)), 1
    conv, fc = model.module.conv, model.module.fc
    expected = torch.zeros_like(X)
    with torch.no_grad():
        for n, x in enumerate(X):
            maps = conv(x[None])[0].relu()
            pooled = maps.mean((1, 2))
            logit = fc(pooled)[label]
            through = fc.weight[label] * pooled
            arrived = through * logit / (logit if biases else through.sum())
            shares = maps / maps.sum((1, 2), keepdim=True) * arrived[:, None, None]  # [4, 4, 4]
            for k in range(4):
                for row in range(4):
                    for column in range(4):
                        window = x[:, row : row + 3, column : column + 3]
                        gains = (conv.weight[k].clamp(min=0) * window.clamp(min=0)) + (
                            conv.weight[k].clamp(max=0) * window.clamp(max=0)
                        )
                        total = gains.sum() + (conv.bias[k].clamp(min=0) if biases else 0)
                        expected[n, :, row : row + 3, column : column + 3] += gains / total * shares[k, row, column]
    found = relevance(model, X, "epsilon_plus", target=label, biases=biases)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_plus_flat", "epsilon_gamma_box"])
@pytest.mark.parametrize("specimen", ["plain", "residual", "concat"])
def test_without_biases_relevance_is_kept(composite: str, specimen: str) -> None:
    """Through skips, concatenations, poolings and means: what the pixels get is the logit."""
    handle, inputs = SPECIMENS[specimen]()
    for module in handle.module.modules():  # no unit is on by its bias alone, which has nothing to hand down to
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean)
    found = tl.explain(handle, inputs, target=2, method=f"zennit.{composite}", biases=False, epsilon=1e-9)
    torch.testing.assert_close(found.values.sum((1, 2)), found.scores, rtol=2e-2, atol=1e-4)
    gaps = torch.tensor(found.diagnostics["conservation_gap"])
    torch.testing.assert_close(gaps, found.scores - found.values.sum((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("composite", ["EpsilonPlus", "EpsilonAlpha2Beta1", "EpsilonPlusFlat"])
def test_a_resnet_gets_what_zennit_gives_its_users(composite: str) -> None:
    """Who name torchvision's blocks and their sums to it; here every sum is seen."""
    import zennit.composites
    from torchvision.models import resnet18
    from zennit.attribution import Gradient
    from zennit.torchvision import ResNetCanonizer

    from torchloupe_adapters import zennit as adapter

    torch.manual_seed(0)
    module = resnet18(num_classes=5).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # so that it matters what it is merged into
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
    inputs = torch.randn(1, 3, 64, 64)
    model = tl.wrap(module, input_size=(3, 64, 64))
    name = {"EpsilonPlus": "epsilon_plus", "EpsilonAlpha2Beta1": "epsilon_alpha2_beta1"}.get(
        composite, "epsilon_plus_flat"
    )
    assert name in adapter.__all__
    found = relevance(model, inputs, name, target=2)

    module.requires_grad_(True)
    rules = getattr(zennit.composites, composite)(canonizers=[ResNetCanonizer()])
    with Gradient(module, rules) as ask:
        _, theirs = ask(inputs, lambda output: output * torch.eye(5)[2])
    apart = (found - theirs.detach()).abs().max() / theirs.abs().max()
    assert apart < 1e-3, apart


def test_the_box_holds_what_pixels_can_be() -> None:
    """Where black and white are known; and each image's own values in any case."""
    from torchloupe_adapters.zennit import _box
    from torchloupe_core.query import Query

    handle, inputs = SPECIMENS["plain"]()
    known = handle.with_spec(mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))
    low, high = _box(Query(known, inputs * 0.1, []))
    assert torch.equal(low, torch.full_like(inputs, -5))
    assert torch.equal(high, torch.full_like(inputs, 5))
    low, high = _box(Query(handle, inputs, []))
    torch.testing.assert_close(low[:, :, 0, 0], inputs.amin((2, 3)))
    torch.testing.assert_close(high[:, :, 3, 1], inputs.amax((2, 3)))


class Twice(nn.Module):
    """One convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """Maps multiplied by each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.fc((y * y.sigmoid()).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "reason"), [(Twice, "runs 2 times"), (Gated, "mul, sigmoid|__mul__")])
def test_what_has_no_rule_is_refused(kind: type[nn.Module], reason: str) -> None:
    model = tl.wrap(kind().eval(), input_size=(3, 8, 8))
    with pytest.raises(tl.errors.NotApplicable, match=f"{reason}.*integrated_gradients"):
        tl.explain(model, torch.randn(1, 3, 8, 8), target=0, method="zennit.epsilon_plus")


def test_what_is_no_sum_of_logits_is_refused() -> None:
    handle, inputs = SPECIMENS["plain"]()
    with pytest.raises(tl.errors.NotApplicable, match="sums of logits"):
        tl.explain(handle, inputs, target="prob:dog", method="zennit.epsilon_plus")
    for options in ({"epsilon": 0.0}, {"gamma": -1.0}):
        with pytest.raises(tl.errors.BadInput, match=next(iter(options))):
            tl.explain(handle, inputs, method="zennit.epsilon_gamma_box", **options)


def test_sums_of_logits_are_sums_of_relevance_for_a_linear_end() -> None:
    handle, inputs = SPECIMENS["residual"]()
    one, other, both = (
        relevance(handle, inputs, "epsilon_plus", target=target)
        for target in ("logit:1", "logit:3", "logit:1-2*logit:3")
    )
    torch.testing.assert_close(both, one - 2 * other, rtol=1e-3, atol=1e-5)
