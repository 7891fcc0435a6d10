"""Captum's methods in our target language, against closed forms and hand-written gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle

SIZE = (3, 8, 10)
X = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(1))


class Linear(nn.Module):
    """Four outputs, linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class Net(nn.Module):
    """A small network with ReLU modules, one of them in place and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.relu2(self.conv2(x))
        logits: Tensor = self.fc(self.relu2(x - 0.1).mean((2, 3)))
        return logits


def wrapped(module: nn.Module) -> Handle:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tl.wrap(module.eval(), input_size=SIZE)


@pytest.fixture(scope="module")
def linear() -> Handle:
    return wrapped(Linear())


@pytest.fixture(scope="module")
def net() -> Handle:
    return wrapped(Net())


def gradient(model: Handle, x: Tensor, value: Any) -> Tensor:
    x = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(value(model.module, x).sum(), x)
    return found


# -- a linear model knows the answer -----------------------------------------------------------------------------------


def test_on_a_linear_model_the_methods_agree(linear: Handle) -> None:
    weight = linear.module.fc.weight.detach()[2].view(SIZE)
    expected = (X * weight).sum(1)
    for method, options in (
        ("input_x_gradient", {}),
        ("integrated_gradients", {"steps": 4}),
        ("occlusion", {"window": 1, "stride": 1}),
    ):
        found = tl.explain(linear, X, target=2, method=method, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=method: f"{n}: {m}")
        assert found.method == f"captum.{method}"
        assert found.backend == "captum"
        assert "captum" in found.versions
        if method != "occlusion":
            assert found.per_channel is not None
            torch.testing.assert_close(found.per_channel, X * weight, atol=1e-4, rtol=1e-4)
    saliency = tl.explain(linear, X, target=2, method="saliency")
    torch.testing.assert_close(saliency.values, weight.abs().amax(0).expand(5, 8, 10))
    assert saliency.per_channel is not None
    torch.testing.assert_close(saliency.per_channel, weight.expand(5, *SIZE))
    assert not saliency.signed


def test_a_baseline_moves_integrated_gradients_and_occlusion(linear: Handle) -> None:
    weight = linear.module.fc.weight.detach()[1].view(SIZE)
    colour = torch.tensor([0.5, -1.0, 2.0])[:, None, None].expand(SIZE)
    for baseline, start in ((0.5, torch.full(SIZE, 0.5)), (colour, colour)):
        for method, options in (("integrated_gradients", {}), ("occlusion", {"window": 1, "stride": 1})):
            found = tl.explain(linear, X, target=1, method=method, baseline=baseline, **options)  # type: ignore[arg-type]
            torch.testing.assert_close(found.values, ((X - start) * weight).sum(1), atol=1e-4, rtol=1e-4)
    for method in ("integrated_gradients", "occlusion", "lime"):
        with pytest.raises(BadInput, match=r"\[C, H, W\] = \[3, 8, 10\]"):
            tl.explain(linear, X, method=method, baseline=torch.zeros(4, 8, 10))


def test_occlusion_averages_over_the_windows_a_pixel_lies_in(linear: Handle) -> None:
    weight = linear.module.fc.weight.detach()[0].view(SIZE)
    effect = (X * weight).sum(1)  # of each pixel
    window, stride = 3, 2
    total, count = torch.zeros(5, 8, 10), torch.zeros(8, 10)
    for top in (0, 2, 4, 6):  # the last ones reach beyond the edge
        for left in (0, 2, 4, 6, 8):
            square = (slice(top, top + window), slice(left, left + window))
            total[:, *square] += effect[:, *square].sum((1, 2))[:, None, None]
            count[square] += 1
    found = tl.explain(linear, X, target=0, method="occlusion", window=window, stride=stride)
    assert found.values.shape == (5, 8, 10)
    torch.testing.assert_close(found.values, total / count, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 9}, {"window": 3, "stride": 4}, {"stride": 0}])
def test_occlusion_refuses_windows_that_leave_gaps(linear: Handle, options: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="1 <= stride <= window <= 8"):
        tl.explain(linear, X, method="occlusion", **options)  # type: ignore[arg-type]


# -- gradients --------------------------------------------------------------------------------------------------------


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


def test_a_list_of_targets_gives_each_image_its_own(net: Handle) -> None:
    targets = ["logit:0", 3, tl.channel("conv1", 2), tl.margin(1), "conv2"]
    for method, options in (
        ("saliency", {}),
        ("input_x_gradient", {}),
        ("integrated_gradients", {"steps": 6}),
        ("guided_backprop", {}),
        ("occlusion", {"window": 4, "stride": 2}),
        ("lime", {"n_samples": 40, "segments": torch.arange(80).view(8, 10) // 20}),
    ):
        mixed = tl.explain(net, X, target=targets, method=method, batch_size=3, **options)  # type: ignore[arg-type]
        assert mixed.targets == ("logit:0", "logit:3", "conv1:2", "margin:1", "conv2")
        for index in (0, 2, 3, 4):
            alone = tl.explain(net, X[index], target=targets[index], method=method, **options)  # type: ignore[arg-type]
            torch.testing.assert_close(
                mixed.values[index], alone.values[0], atol=1e-5, rtol=1e-4, msg=lambda m, n=method: f"{n}: {m}"
            )


# -- integrated gradients ---------------------------------------------------------------------------------------------


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


# -- guided backpropagation -------------------------------------------------------------------------------------------


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


# -- LIME -------------------------------------------------------------------------------------------------------------


def quarters() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(10), indexing="ij")
    return (rows // 4) * 7 + (columns // 5) * 3 + 2  # numbers with gaps


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
    """One if exactly one of two quarters is there, which no sum of segments can express."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = (x[:, 0, 0, 0] > 0.5).float(), (x[:, 0, -1, -1] > 0.5).float()
        return torch.stack([a + b - 2 * a * b, a], 1)


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


# -- nothing to differentiate -----------------------------------------------------------------------------------------


class Steps(nn.Module):
    """Outputs that do not depend on the input by any gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean((1, 2, 3)) > 0).float()[:, None] * self.weight.detach()


@pytest.mark.parametrize("method", ["saliency", "input_x_gradient", "integrated_gradients"])
def test_a_target_without_a_gradient_is_refused(method: str) -> None:
    with pytest.raises(NotApplicable, match="gradient"):
        tl.explain(tl.wrap(Steps(), input_size=SIZE), X, target=0, method=method)


def test_the_input_stays_the_callers(net: Handle) -> None:
    mine = X.clone()
    for method in ("saliency", "guided_backprop", "occlusion", "input_x_gradient"):
        tl.explain(net, mine, target=0, method=method)
        assert torch.equal(mine, X)
        assert not mine.requires_grad
        assert mine.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.module.parameters())


@pytest.mark.parametrize("method", ["saliency", "input_x_gradient", "guided_backprop", "grad_cam", "cam", "eigen_cam"])
def test_one_forward_answers_a_stated_target(method: str) -> None:
    """Where CAM applies; the score in the result comes from the same pass."""
    model = tl.load("demo")
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = tl.explain(model, x, target="logit:car", method=method)
    assert found.forwards == 3
    torch.testing.assert_close(found.scores, model.score(x, "logit:car"), atol=1e-5, rtol=1e-5)
