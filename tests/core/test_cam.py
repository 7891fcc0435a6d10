"""CAM and Grad-CAM: the identities they satisfy, plain implementations beside them, and where they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.layout import to_map


class Pooled(nn.Module):
    """Convolutions, global average pooling, one linear layer; what lies between and after is exchangeable."""

    def __init__(self, *, between: nn.Module | None = None, pool: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.Tanh(), nn.Conv2d(12, 12, 1)
        )
        self.pool = pool or nn.AdaptiveAvgPool2d(1)
        self.between = between or nn.Identity()
        self.fc = nn.Linear(12, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.between(self.pool(self.body(x)).flatten(1)))
        return logits


SIZE = (3, 16, 24)
X = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(1))


def wrapped(module: nn.Module) -> Handle:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return tl.wrap(module.eval(), input_size=SIZE)


# -- CAM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", ["logit:3", "logit:1-2*logit:4", None])
def test_the_mean_of_a_cam_plus_the_bias_is_the_logit(bias: bool, target: str | None) -> None:
    model = wrapped(Pooled(bias=bias))
    found = tl.explain(model, X, target=target, method="cam")
    assert found.layer == "body"
    assert found.values.shape == (5, 8, 12)
    weights = torch.zeros(5, 5)
    if target == "logit:3":
        weights[:, 3] = 1
    elif target:
        weights[:, 1], weights[:, 4] = 1, -2
    else:
        with torch.no_grad():
            weights[torch.arange(5), model.module(X).argmax(1)] = 1
    offset = weights @ model.module.fc.bias.detach() if bias else 0
    torch.testing.assert_close(found.values.mean((1, 2)) + offset, found.scores, atol=1e-5, rtol=1e-5)


def test_cam_against_its_definition() -> None:
    model = wrapped(Pooled())
    with torch.no_grad():
        maps = model.module.body(X)
        expected = (model.module.fc.weight[3][None, :, None, None] * maps).sum(1)
    torch.testing.assert_close(tl.explain(model, X, target=3, method="cam").values, expected)


def test_cam_of_a_fully_convolutional_head() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1), nn.Flatten())
    found = tl.explain(wrapped(module), X, target=2, method="cam")
    bias = module[3].bias.detach()[2]
    torch.testing.assert_close(found.values.mean((1, 2)) + bias, found.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "options", "reason"),
    [
        (Pooled(between=nn.LayerNorm(12)), {}, "nothing but average pooling"),
        (Pooled(between=nn.ReLU()), {}, "nothing but average pooling"),
        (Pooled(pool=nn.AdaptiveMaxPool2d(1)), {}, "nothing but average pooling"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 9), nn.ReLU())
            + nn.Sequential(nn.Linear(9, 5)),
            {},
            "right after the features",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), {}, "linear classifier"),
        (Pooled(), {"layer": "body.0"}, "channels"),
        (Pooled(), {"layer": "body.2"}, "nothing but average pooling"),
        (Pooled(), {"target": "prob:1"}, "sums of logits only"),
        (Pooled(), {"target": "margin:1"}, "sums of logits only"),
        (Pooled(), {"target": "body.2:1"}, "sums of logits only"),
        (Pooled(), {"target": "logit:1+body.2:1"}, "sums of logits only"),
        (Pooled(), {"layer": "fc"}, "has one position"),
    ],
)
def test_cam_refuses_with_the_reason(module: nn.Module, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotApplicable) as caught:
        tl.explain(wrapped(module), X, method="cam", **options)
    assert reason in str(caught.value)
    if "layer" not in options:
        assert "grad_cam" in str(caught.value)


def test_a_head_of_zeros_does_not_let_cam_pass() -> None:
    """torchvision's vision transformers begin with one: every logit is 0, and so is every wrong map."""
    module = Pooled(between=nn.LayerNorm(12))
    for parameter in module.fc.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(NotApplicable, match="the features differ by"):
        tl.explain(wrapped(module), X, target=0, method="cam")


def test_cam_refuses_a_model_with_something_after_the_classifier() -> None:
    with pytest.raises(NotApplicable):
        tl.explain(wrapped(nn.Sequential(Pooled(), nn.Softmax(1))), X, method="cam")


# -- Grad-CAM ---------------------------------------------------------------------------------------------------------


def test_grad_cam_is_cam_over_the_positions_on_a_pooled_linear_head() -> None:
    model = wrapped(Pooled())
    cam = tl.explain(model, X, target="logit:1-2*logit:4", method="cam").values
    grad_cam = tl.explain(model, X, target="logit:1-2*logit:4", method="grad_cam").values
    torch.testing.assert_close(grad_cam, cam / (8 * 12), atol=1e-6, rtol=1e-5)


def plain_grad_cam(model: Handle, x: Tensor, layer: str, value: Any) -> Tensor:
    """Grad-CAM with the whole graph, a hook and `.backward()`, one image at a time."""
    module = model.module
    layout = model.layers[layer].layout
    assert layout is not None
    maps = []
    for image in x:
        kept: list[Tensor] = []
        hook = module.get_submodule(layer).register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        try:
            output = module(image[None].clone().requires_grad_(True))
        finally:
            hook.remove()
        activation = kept[-1]
        (gradient,) = torch.autograd.grad(value(output)[0], activation)
        weights = to_map(gradient, layout).mean((2, 3), keepdim=True)
        maps.append((weights * to_map(activation, layout)).sum(1)[0].detach())
    return torch.stack(maps)


def timm_model(name: str, **options: Any) -> Handle:
    torch.manual_seed(0)
    model = tl.load(f"timm/{name}", pretrained=False, **options)
    for parameter in model.module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # heads that begin at zero
    return model


@pytest.mark.parametrize(
    ("make", "layer", "order"),
    [
        (lambda: wrapped(Pooled(between=nn.LayerNorm(12))), "body.4", "nchw"),
        (lambda: wrapped(Pooled()), "body.2", "nchw"),
        (lambda: timm_model("resnet18", input_size=(3, 64, 96)), "layer4", "nchw"),
        (
            lambda: timm_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1), window_size=4),
            "norm",
            "nhwc",
        ),
        (lambda: timm_model("vit_tiny_patch16_224", img_size=64, depth=2), "blocks.1.norm1", "tokens"),
        (
            lambda: timm_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=2, num_classes=5),
            "blocks.0",
            "tokens",
        ),
    ],
    ids=["norm", "middle", "resnet", "swin", "vit", "registers"],
)
def test_grad_cam_against_a_plain_implementation(make: Any, layer: str, order: str) -> None:
    model = make()
    assert model.layers[layer].layout.order == order
    x = torch.randn(2, *model.spec.input_size, generator=torch.Generator().manual_seed(3))
    for target, value in (
        ("logit:3", lambda out: out[:, 3]),
        ("margin:1", lambda out: out[:, 1] - torch.cat([out[:, :1], out[:, 2:]], 1).amax(1)),
        ("prob:2", lambda out: out.softmax(1)[:, 2]),
    ):
        found = tl.explain(model, x, target=target, layer=layer)
        expected = plain_grad_cam(model, x, layer, value)
        assert expected.std() > 0
        torch.testing.assert_close(found.values, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-3)


def test_the_default_layer_of_a_middle_unit_lies_before_it() -> None:
    model = wrapped(Pooled())
    found = tl.explain(model, X, target="body.3:2@1,1")
    assert found.layer == "body.2"
    # Of tanh(a) at one position only that position has a gradient.
    a = model.module.body[:3](X).detach()
    weight = (1 - a[:, 2, 1, 1].tanh() ** 2) / (8 * 12)
    torch.testing.assert_close(found.values, weight[:, None, None] * a[:, 2])


def test_a_layer_after_the_target_is_refused() -> None:
    with pytest.raises(NotApplicable, match=r"before layer 'body\.4'"):
        tl.explain(wrapped(Pooled()), X, target="body.2:1", layer="body.4")


def test_the_target_layer_itself_may_be_read() -> None:
    found = tl.explain(wrapped(Pooled()), X, target="body.4:3", layer="body.4")
    with torch.no_grad():
        maps = wrapped(Pooled()).module.body(X)
    torch.testing.assert_close(found.values, maps[:, 3] / (8 * 12))


def test_a_layer_the_target_does_not_depend_on_is_refused() -> None:
    class Branch(Pooled):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            self.side(x)
            return logits

    with pytest.raises(NotApplicable, match="does not depend on layer 'side'; layer='body' would work"):
        tl.explain(wrapped(Branch()), X, target=1, layer="side")


def test_after_the_last_attention_of_a_class_token_model_patches_are_refused() -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=64, depth=2)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(NotApplicable, match=r"only the class token counts.*blocks\.1\.norm1"):
        tl.explain(model, x, target=0, layer="blocks.1")


def test_a_list_of_targets_and_any_batch_size_give_the_same_maps() -> None:
    model = wrapped(Pooled(between=nn.LayerNorm(12)))
    targets = ["logit:0", 1, tl.margin(2), tl.channel("body.2", 4), "logit:0"]
    mixed = tl.explain(model, X, target=targets, layer="body.1", batch_size=2)
    assert mixed.targets == ("logit:0", "logit:1", "margin:2", "body.2:4", "logit:0")
    for index, target in enumerate(targets):
        alone = tl.explain(model, X[index], target=target, layer="body.1")
        torch.testing.assert_close(mixed.values[index], alone.values[0])
        torch.testing.assert_close(mixed.scores[index], alone.scores[0])
