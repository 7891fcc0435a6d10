"""Captum's Grad-CAM against ours, and ours with guided backpropagation against Captum's two passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum_nets import SIZE, Net, X, wrapped
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.specimens import SPECIMENS


class Separate(nn.Module):
    """A ReLU module for each use, as Captum needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        logits: Tensor = self.fc(self.relu3(self.conv3(x)).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def separate() -> Handle:
    return wrapped(Separate())


# -- Grad-CAM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, "conv1", "relu1", "conv2", "relu2"])
@pytest.mark.parametrize("target", ["logit:2", "prob:1", "margin:0", "0.5*logit:1-relu2:3@1,2"])
def test_captums_grad_cam_is_ours(layer: str | None, target: str) -> None:
    """Also of a layer that an in-place ReLU follows, and of the last call of a module."""
    net = wrapped(Net())
    ours = tl.explain(net, X, target=target, method="grad_cam", layer=layer)
    theirs = tl.explain(net, X, target=target, method="captum.grad_cam", layer=layer, batch_size=2)
    torch.testing.assert_close(theirs.values, ours.values, atol=1e-4 * ours.values.abs().max().item(), rtol=0)
    torch.testing.assert_close(theirs.scores, ours.scores)
    assert theirs.layer == ours.layer
    assert theirs.forwards == len(X)
    assert theirs.signed
    assert (theirs.values < 0).any()


@pytest.mark.parametrize("name", ["nhwc", "vit_registers"])
def test_captums_grad_cam_refuses_other_layouts(name: str) -> None:
    """Captum alone takes tokens for channels."""
    handle, inputs = SPECIMENS[name]()
    with pytest.raises(NotApplicable, match=r"\[N, C, h, w\], but its layout is (nhwc|tokens); use grad_cam"):
        tl.explain(handle, inputs, method="captum.grad_cam")


def test_captums_grad_cam_refuses_what_captum_cannot_name() -> None:
    net = wrapped(Net())
    for layer in ("relu2#1", "conv2.in"):
        with pytest.raises(NotApplicable, match=f"not '{layer}'; use grad_cam"):
            tl.explain(net, X, target=1, method="captum.grad_cam", layer=layer)


class Pair(nn.Module):
    """A layer that gives two tensors, and one beside the way to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.aside, self.fc = Two(), nn.Conv2d(3, 2, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.two(x)
        self.aside(x)
        logits: Tensor = self.fc((left * right).mean((2, 3)))
        return logits


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x + 1


def test_captums_grad_cam_refuses_layers_of_several_tensors_or_beside_the_way() -> None:
    model = wrapped(Pair())
    with pytest.raises(NotApplicable, match="several tensors"):
        tl.explain(model, X, target=1, method="captum.grad_cam", layer="two")
    with pytest.raises(NotApplicable, match="does not depend on layer 'aside'") as caught:
        tl.explain(model, X, target=1, method="captum.grad_cam", layer="aside")
    assert isinstance(caught.value.__cause__, RuntimeError)


# -- guided Grad-CAM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["conv1", "relu1", "conv2", "relu2", "relu3"])
def test_guided_grad_cam_is_captums_in_one_pass(separate: Handle, layer: str) -> None:
    from captum.attr import GuidedGradCam

    found = tl.explain(separate, X, target=2, method="guided_grad_cam", layer=layer)
    captum = GuidedGradCam(separate.module, separate.module.get_submodule(layer))
    with pytest.warns(UserWarning, match="backward hooks on ReLU|require gradients"):
        expected = captum.attribute(X.clone(), target=2, interpolate_mode="bilinear").detach()
    assert expected.any()
    torch.testing.assert_close(found.per_channel, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
    torch.testing.assert_close(found.values, expected.abs().amax(1), atol=1e-6, rtol=1e-4)
    assert found.forwards == len(X)
    assert found.layer == layer
    torch.testing.assert_close(found.scores, separate.score(X, 2))


@pytest.mark.parametrize("target", ["logit:2", "prob:1", "relu2:3", "conv2:1@1,2+0.5*logit:0"])
def test_guided_grad_cam_is_the_product_of_its_two_methods(separate: Handle, target: str) -> None:
    layer = "relu1"
    cam = tl.explain(separate, X, target=target, method="grad_cam", layer=layer).values.relu()
    guided = tl.explain(separate, X, target=target, method="guided_backprop").per_channel
    enlarged = F.interpolate(cam[:, None], SIZE[1:], mode="bilinear")
    found = tl.explain(separate, X, target=target, method="guided_grad_cam", layer=layer)
    assert guided is not None
    torch.testing.assert_close(found.per_channel, guided * enlarged, atol=1e-6, rtol=1e-4)


class Functional(Separate):
    """The same network, rectified by functions of every kind, some in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        F.relu(x, inplace=True)
        x = torch.relu(self.conv2(x))
        x = self.conv3(x)
        x.relu_()
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_guided_grad_cam_guides_functions_too(separate: Handle) -> None:
    functional = Handle(Functional().eval(), separate.spec)
    functional.module.load_state_dict(separate.module.state_dict())
    for layer in ("conv1", "conv2", "conv3"):
        found = tl.explain(functional, X, target=2, method="guided_grad_cam", layer=layer)
        expected = tl.explain(separate, X, target=2, method="guided_grad_cam", layer=layer)
        torch.testing.assert_close(found.per_channel, expected.per_channel, atol=1e-6, rtol=1e-4)


def test_guided_grad_cam_refuses_models_without_relu() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(NotApplicable, match=r"no ReLU.*saliency times grad_cam"):
        tl.explain(wrapped(model), X, target=1, method="guided_grad_cam")
