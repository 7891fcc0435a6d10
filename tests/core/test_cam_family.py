"""The relatives of Grad-CAM against closed forms, plain loops and their papers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.handle import Handle
from torchloupe_core.specimens import SPECIMENS

X = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two stages and a head that is linear after average pooling, or not linear at all."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 10, 3, padding=1), nn.Softplus())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.body(self.stem(x))).flatten(1))
        return logits


def linear() -> Handle:
    torch.manual_seed(0)
    return tl.wrap(Net(nn.Linear(10, 4)), input_size=(3, 16, 24))


def curved() -> Handle:
    torch.manual_seed(0)
    return tl.wrap(Net(nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4))), input_size=(3, 16, 24))


def features_and_gradient(model: Handle, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """The first stage's map and the gradient of a logit there, from the whole graph."""
    features = model.module.stem(x).detach().requires_grad_(True)
    logits = model.module.head(model.module.pool(model.module.body(features)).flatten(1))
    (gradient,) = torch.autograd.grad(logits[:, index].sum(), features)
    return features.detach(), gradient


@pytest.mark.parametrize("method", ["grad_cam", "xgrad_cam", "hires_cam"])
def test_on_a_pooled_linear_head_the_family_is_cam_over_the_positions(method: str) -> None:
    cam = tl.explain(linear(), X, target=2, method="cam")
    found = tl.explain(linear(), X, target=2, method=method)
    assert found.layer == cam.layer == "body"
    torch.testing.assert_close(found.values, cam.values / (8 * 12), atol=1e-6, rtol=1e-4)


def grad_cam_plus_plus(a: Tensor, g: Tensor) -> Tensor:
    total = torch.zeros(a.shape[1:])
    for k in range(a.shape[0]):
        weight = 0.0
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                below = 2 * g[k, i, j] ** 2 + a[k].sum() * g[k, i, j] ** 3
                weight += float(g[k, i, j] ** 2 / below * g[k, i, j].clamp(min=0)) if below != 0 else 0.0
        total += weight * a[k]
    return total


def xgrad_cam(a: Tensor, g: Tensor) -> Tensor:
    return sum(((g[k] * a[k] / a[k].sum()).sum() * a[k] for k in range(len(a)) if a[k].sum() != 0), torch.zeros(8, 12))


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        ("grad_cam++", grad_cam_plus_plus),
        ("xgrad_cam", xgrad_cam),
        ("hires_cam", lambda a, g: (a * g).sum(0)),
        ("layer_cam", lambda a, g: (a * g.clamp(min=0)).sum(0)),
    ],
)
def test_a_gradient_cam_is_its_paper_s_formula(method: str, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = curved()
    features, gradient = features_and_gradient(model, X, 1)
    found = tl.explain(model, X, target=1, method=method, layer="stem")
    expected = torch.stack([formula(a, g) for a, g in zip(features, gradient, strict=True)])
    assert expected.std() > 0
    torch.testing.assert_close(found.values, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


def test_eigen_cam_is_the_first_principal_projection_and_knows_no_target() -> None:
    model = curved()
    found = tl.explain(model, X, target=0, method="eigen_cam", layer="stem")
    other = tl.explain(model, X, target=3, method="eigen_cam", layer="stem")
    assert torch.equal(found.values, other.values)
    for index, features in enumerate(model.module.stem(X).detach()):
        positions = features.flatten(1).T.double()  # [h*w, C]
        covariance = torch.cov(positions.T)
        direction = torch.linalg.eigh(covariance).eigenvectors[:, -1]
        projected = positions @ direction
        expected = (projected * projected.sum().sign()).view(8, 12).float()
        torch.testing.assert_close(found.values[index], expected, atol=1e-4, rtol=1e-3)


def test_score_cam_against_a_loop() -> None:
    model = curved()
    found = tl.explain(model, X, target=1, method="score_cam", layer="stem", batch_size=4)
    for index, image in enumerate(X):
        features, scores = model.module.stem(image[None]).detach()[0], []
        for channel in features:
            mask = F.interpolate(channel[None, None], (16, 24), mode="bilinear", align_corners=False)[0, 0]
            mask = (mask - mask.min()) / (mask.max() - mask.min()) if mask.max() > mask.min() else torch.zeros(16, 24)
            scores.append(model.module((image * mask)[None])[0, 1].item())
        expected = (torch.tensor(scores).softmax(0)[:, None, None] * features).sum(0)
        torch.testing.assert_close(found.values[index], expected, atol=1e-5, rtol=1e-4)


def ablated(model: Handle, image: Tensor, layer: str, index: int) -> Tensor:
    """Ablation-CAM with a hook and a whole forward pass for each channel."""
    module = model.module.get_submodule(layer)
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda m, i, o: kept.append(o.detach().clone()))
    value = model.module(image[None])[0, index].item()
    hook.remove()
    total = torch.zeros(kept[-1].shape[2:])
    for channel in range(kept[-1].shape[1]):

        def without(m: nn.Module, i: object, o: Tensor, channel: int = channel) -> Tensor:
            changed = o.clone()
            changed[:, channel] = 0
            return changed

        hook = module.register_forward_hook(without)
        fallen = value - model.module(image[None])[0, index].item()
        hook.remove()
        total += fallen / abs(value) * kept[-1][0, channel]
    return total


@pytest.mark.parametrize("specimen", ["plain", "residual", "concat", "grayscale"])
def test_ablation_cam_against_a_loop_at_every_convolution(specimen: str) -> None:
    model, inputs = SPECIMENS[specimen]()
    layers = [layer.name for layer in model.layers.values() if layer.kind == "Conv2d" and layer.spatial]
    assert layers
    with torch.no_grad():
        for layer in layers:
            found = tl.explain(model, inputs[:1], target=1, method="ablation_cam", layer=layer)
            expected = ablated(model, inputs[0], layer, 1)
            torch.testing.assert_close(found.values[0], expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-2)


def test_ablation_cam_of_a_linear_head_has_a_closed_form() -> None:
    """Without channel k the logit falls by w_k mean(A_k)."""
    model = linear()
    found = tl.explain(model, X, target=2, method="ablation_cam")
    features = model.module.body(model.module.stem(X)).detach()
    weights = model.module.head.weight[2].detach() * features.mean((2, 3)) / found.scores.abs()[:, None]
    torch.testing.assert_close(found.values, torch.einsum("nchw,nc->nhw", features, weights), atol=1e-5, rtol=1e-3)


def test_ablation_cam_runs_the_trunk_once_for_many_channels() -> None:
    model = tl.load("timm/resnet18", pretrained=False, input_size=(3, 64, 64))
    found = tl.explain(model, torch.randn(1, 3, 64, 64), target=3, method="ablation_cam")
    assert model.layers["layer4"].channels == 512
    assert found.forwards <= 5  # the prediction, the features, the value, and the channels in few chunks


def test_ablation_cam_does_not_mistake_the_model_s_own_trouble_for_a_joined_batch() -> None:
    model = curved()
    assert model.layers  # traced before anything fails
    calls = 0

    def failing(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("out of luck")

    with model.module.head.register_forward_pre_hook(failing), pytest.raises(RuntimeError, match="out of luck"):
        tl.explain(model, X[:1], target=1, method="ablation_cam", layer="stem")
