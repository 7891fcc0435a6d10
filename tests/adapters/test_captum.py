"""Captum's methods in our target language, against closed forms."""

from __future__ import annotations

import pytest
import torch
from captum_nets import SIZE, Linear, Net, X, wrapped
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle


@pytest.fixture(scope="module")
def linear() -> Handle:
    return wrapped(Linear())


@pytest.fixture(scope="module")
def net() -> Handle:
    return wrapped(Net())


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
