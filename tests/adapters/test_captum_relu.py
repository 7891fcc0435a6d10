"""Guided backpropagation and deconvolution, against hand-written gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from captum_nets import Linear, Net, X, gradient, wrapped
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Handle


@pytest.fixture(scope="module")
def linear() -> Handle:
    return wrapped(Linear())


@pytest.fixture(scope="module")
def net() -> Handle:
    return wrapped(Net())


class Guided(torch.autograd.Function):
    """ReLU whose gradient lets positive values through only, where the input was positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return given.clamp(min=0) * (x > 0)


def guided_forward(m: Net, x: Tensor) -> dict[str, Tensor]:
    conv1 = F.conv2d(x, m.conv1.weight, m.conv1.bias, padding=1)
    conv2 = F.conv2d(Guided.apply(conv1), m.conv2.weight, m.conv2.bias, 2, 1)  # type: ignore[no-untyped-call]
    last = Guided.apply(Guided.apply(conv2) - 0.1)  # type: ignore[no-untyped-call]
    return {"conv1": conv1, "conv2": conv2, "logits": F.linear(last.mean((2, 3)), m.fc.weight, m.fc.bias)}


def test_guided_backprop_against_a_hand_written_gradient(net: Handle) -> None:
    values: dict[str, Any] = {
        "logit:2": lambda m, x: guided_forward(m, x)["logits"][:, 2],
        "-logit:2": lambda m, x: -guided_forward(m, x)["logits"][:, 2],
        "conv2:5@2,3": lambda m, x: guided_forward(m, x)["conv2"][:, 5, 2, 3],  # a neuron of a middle layer
        "conv1:1": lambda m, x: guided_forward(m, x)["conv1"][:, 1].mean((1, 2)),
    }
    for text, value in values.items():
        found = tl.explain(net, X, target=text, method="guided_backprop")
        expected = gradient(net, X, value)
        assert expected.abs().max() > 0
        torch.testing.assert_close(found.per_channel, expected, msg=lambda m, t=text: f"{t}: {m}")
        torch.testing.assert_close(found.values, expected.abs().amax(1))
    plain = tl.explain(net, X, target="logit:2", method="saliency").per_channel
    assert not torch.allclose(plain, tl.explain(net, X, target="logit:2", method="guided_backprop").per_channel)


def test_guided_backprop_leaves_in_place_modules_as_they_were(net: Handle) -> None:
    before = copy.deepcopy(net.module.state_dict())
    tl.explain(net, X, method="guided_backprop")
    assert net.module.relu1.inplace
    assert not net.module.relu2.inplace
    assert not any(
        part._backward_hooks or part._forward_hooks or part._forward_pre_hooks for part in net.module.modules()
    )
    assert all(torch.equal(value, before[key]) for key, value in net.module.state_dict().items())


def test_guided_backprop_through_a_rectifier_working_in_place_on_another() -> None:
    def stack(*, inplace: bool) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.ReLU(inplace=inplace),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )

    found, expected = (
        tl.explain(wrapped(stack(inplace=inplace)), X, target=1, method="guided_backprop").values
        for inplace in (True, False)
    )
    torch.testing.assert_close(found, expected)


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


def test_guided_backprop_refuses_what_it_cannot_reach() -> None:
    smooth = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(NotApplicable, match=r"no torch\.nn\.ReLU.*saliency"):
        tl.explain(wrapped(smooth), X, method="guided_backprop")
    with pytest.raises(NotApplicable, match="rectifies 1 times through a function"):
        tl.explain(wrapped(Functional()), X, method="guided_backprop")
    for name in ("densenet121", "googlenet"):
        options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
        model = tl.load(f"torchvision/{name}", pretrained=False, input_size=(3, 64, 64), **options)
        with pytest.raises(NotApplicable, match="guided_backprop"):
            tl.explain(model, torch.randn(1, 3, 64, 64), method="guided_backprop")


# -- deconvolution ----------------------------------------------------------------------------------------------------


class Deconvolved(torch.autograd.Function):
    """ReLU whose gradient lets positive values through, wherever it was on or off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.relu()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:  # type: ignore[override]
        return given.clamp(min=0)


RULES = {"guided_backprop": Guided.apply, "deconvolution": Deconvolved.apply}


def test_deconvolution_against_a_hand_written_gradient(net: Handle) -> None:
    relu = Deconvolved.apply

    def value(m: Net, x: Tensor) -> Tensor:
        conv2 = F.conv2d(relu(F.conv2d(x, m.conv1.weight, m.conv1.bias, padding=1)), m.conv2.weight, m.conv2.bias, 2, 1)
        return F.linear(relu(relu(conv2) - 0.1).mean((2, 3)), m.fc.weight, m.fc.bias)[:, 2]

    found = tl.explain(net, X, target="logit:2", method="deconvolution")
    expected = gradient(net, X, value)
    torch.testing.assert_close(found.per_channel, expected)
    torch.testing.assert_close(found.values, expected.abs().amax(1))
    assert not found.signed
    assert not torch.allclose(expected, tl.explain(net, X, target="logit:2", method="guided_backprop").per_channel)


class Tangled(nn.Module):
    """One ReLU module on two branches at once, on a tensor that a skip reads too, and right after another ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.relu, self.last, self.fc = nn.ReLU(), nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.relu, self.last)

    def run(self, x: Tensor, relu: Any, last: Any) -> Tensor:
        x = self.conv1(x)
        y = x + relu(x)  # before an activation, as in pre-activation networks
        left, right = self.conv2(y), self.conv3(y)
        left, right = relu(left), relu(right)
        logits: Tensor = self.fc(last(relu(left - right - 0.2)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("method", RULES)
def test_relus_that_share_tensors_and_modules_keep_apart(method: str) -> None:
    """Captum alone clamps the skip's gradient too, and mixes up the branches."""
    tangled = wrapped(Tangled())
    for target in range(4):
        found = tl.explain(tangled, X, target=target, method=method)
        rule = RULES[method]
        expected = gradient(tangled, X, lambda m, x, r=rule, t=target: m.run(x, r, r)[:, t])
        torch.testing.assert_close(found.per_channel, expected, atol=1e-6, rtol=1e-4)


class Overwritten(nn.Module):
    """A skip reads what an in-place ReLU left of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.relu(y)
        logits: Tensor = self.fc((z - 0.3 * y.square()).mean((2, 3)))
        return logits


@pytest.mark.parametrize("method", RULES)
def test_a_relu_in_place_is_in_place_still(method: str) -> None:
    model = wrapped(Overwritten())

    def value(m: Overwritten, x: Tensor) -> Tensor:
        y = RULES[method](m.conv(x))
        return F.linear((y - 0.3 * y.square()).mean((2, 3)), m.fc.weight, m.fc.bias)[:, 1]

    found = tl.explain(model, X, target=1, method=method)
    torch.testing.assert_close(found.scores, model.score(X, 1))
    torch.testing.assert_close(found.per_channel, gradient(model, X, value))
    assert found.forwards == len(X)


@pytest.mark.parametrize("method", RULES)
def test_the_relus_are_the_users_own_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an answer and after an exception; a user's hook on one is called as ever."""
    tangled, called = wrapped(Tangled()), []
    tangled.module.relu.register_forward_hook(lambda *_: called.append(1))
    before = dict(tangled.module.relu.__dict__)
    tl.explain(tangled, X, target=0, method=method)
    assert called
    monkeypatch.setattr(tangled.module.fc, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tl.explain(tangled, X, target=0, method=method)
    assert type(tangled.module.relu) is type(tangled.module.last) is nn.ReLU
    assert tangled.module.relu.__dict__ == before
    assert list(tangled.module.relu.children()) == []


def test_deconvolution_refuses_what_it_cannot_reach() -> None:
    with pytest.raises(NotApplicable, match=r"rectifies 1 times through a function.*deconvolution would mix"):
        tl.explain(wrapped(Functional()), X, method="deconvolution")
