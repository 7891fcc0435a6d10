"""What a forward pass shows of real architectures: layers, their layout, the features and the embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.layout import Layout, to_map
from torchloupe_core.spec import Spec
from torchloupe_core.trace import is_inside_attention

# model and options (small inputs and few blocks: the names, orders and prefixes are those of the full models), and then
# the features layer, its channels, grid, order and prefix, and the embedding
SMALL = {"input_size": (3, 64, 96)}
CASES: list[tuple[str, dict[str, Any], tuple[str, int, tuple[int, int], str, int, str]]] = [
    ("timm/resnet18", {"input_size": (3, 96, 128)}, ("layer4", 512, (3, 4), "nchw", 0, "fc.in")),
    ("timm/convnext_atto", {"input_size": (3, 96, 128)}, ("stages", 320, (3, 4), "nchw", 0, "head.fc.in")),
    (
        "timm/swin_tiny_patch4_window7_224",
        {"img_size": 64, "depths": (1, 1, 2, 1), "window_size": 4},
        ("norm", 768, (2, 2), "nhwc", 0, "head.fc.in"),
    ),
    (
        "timm/vit_tiny_patch16_224",
        {"img_size": (64, 96), "depth": 2},
        ("blocks.1.norm1", 192, (4, 6), "tokens", 1, "head.in"),
    ),
    (
        "timm/vit_small_patch14_reg4_dinov2",
        {"img_size": (56, 84), "depth": 2},
        ("blocks.1.norm1", 384, (4, 6), "tokens", 5, "head.in"),
    ),
    (
        "timm/vit_small_patch16_dinov3",
        {"input_size": (3, 64, 96), "depth": 2},
        ("norm", 384, (4, 6), "tokens", 5, "head.in"),
    ),
    (
        "timm/deit_tiny_distilled_patch16_224",
        {"img_size": 64, "depth": 2},
        ("blocks.1.norm1", 192, (4, 4), "tokens", 2, "head.in"),
    ),
    (
        "timm/cait_xxs24_224",
        {"img_size": 64, "depth": 2},
        ("blocks_token_only.1.norm1", 192, (4, 4), "tokens", 1, "head.in"),
    ),
    ("timm/coat_lite_tiny", {}, ("serial_blocks4.1.norm1", 320, (7, 7), "tokens", 1, "head.in")),
    ("timm/pit_ti_224", {}, ("transformers.2.blocks.3.norm1", 256, (7, 7), "tokens", 1, "head.in")),
    ("timm/volo_d1_224", {}, ("post_network.1.norm1", 384, (14, 14), "tokens", 1, "head.in")),
    ("timm/mixer_s32_224", {}, ("norm", 512, (7, 7), "tokens", 0, "head.in")),
    ("timm/mambaout_femto", SMALL, ("stages", 288, (2, 3), "nhwc", 0, "head.fc.in")),
    ("timm/densenet121", SMALL, ("features", 1024, (2, 3), "nchw", 0, "classifier.in")),
    ("timm/efficientnet_b0", SMALL, ("bn2", 1280, (2, 3), "nchw", 0, "classifier.in")),
    ("timm/mobilenetv3_small_050", SMALL, ("blocks", 288, (2, 3), "nchw", 0, "classifier.in")),
    ("torchvision/resnet18", SMALL, ("layer4", 512, (2, 3), "nchw", 0, "fc.in")),
    ("torchvision/convnext_tiny", SMALL, ("features", 768, (2, 3), "nchw", 0, "classifier.2.in")),
    ("torchvision/swin_t", SMALL, ("permute", 768, (2, 3), "nchw", 0, "head.in")),
    ("torchvision/densenet121", SMALL, ("features", 1024, (2, 3), "nchw", 0, "classifier.in")),
    (
        "torchvision/googlenet",
        {"input_size": (3, 64, 96), "init_weights": False},
        ("inception5b", 1024, (2, 3), "nchw", 0, "fc.in"),
    ),
    ("torchvision/mobilenet_v3_small", SMALL, ("features", 576, (2, 3), "nchw", 0, "classifier.3.in")),
    ("torchvision/efficientnet_b0", SMALL, ("features", 1280, (2, 3), "nchw", 0, "classifier.1.in")),
    ("torchvision/squeezenet1_1", SMALL, ("classifier.2", 1000, (3, 5), "nchw", 0, "classifier.1.in")),
    ("torchvision/shufflenet_v2_x0_5", SMALL, ("conv5", 1024, (2, 3), "nchw", 0, "fc.in")),
]
CLASSLESS = ("dinov2", "dinov3")  # their pretrained weights come without a classifier


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_features_embedding_and_layouts(case: tuple[Any, ...]) -> None:
    name, options, (features, channels, grid, order, prefix, embedding) = case
    torch.manual_seed(0)
    model = tl.load(name, pretrained=False, **options)
    assert model.features == features
    assert model.layers[features].layout == Layout(order, channels, grid, prefix)
    assert model.layers[features].size == grid
    assert model.embedding == embedding
    assert len(model.classes or ()) == (0 if name.endswith(CLASSLESS) else 1000)
    assert not model.layers[features].in_attention
    _each_layer_fits(model)
    if order != "nchw" and "mixer" not in name:  # which mixes all positions alike
        _corners_stay_corners(model)


def _each_layer_fits(model: Handle) -> None:
    spatial = [layer for layer in model.layers.values() if layer.spatial][::4]
    with model.watch(*spatial) as watch:
        watch(torch.randn(1, *model.spec.input_size or ()))
        for layer in spatial:
            assert layer.layout is not None
            h, w = layer.layout.grid
            assert watch[layer].shape[layer.layout.channel_dim] == layer.channels, layer.name
            assert watch[layer].numel() == (layer.channels or 0) * (h * w + layer.layout.prefix), layer.name


def _corners_stay_corners(model: Handle) -> None:
    """A change in one corner of the image moves that corner of the map most: order, prefix and grid are right."""
    x = torch.randn(1, *model.spec.input_size or (), generator=torch.Generator().manual_seed(0))
    height, width = x.shape[2:]
    corners = [(0, 0), (0, 1), (1, 0)]
    batch = x.repeat(len(corners) + 1, 1, 1, 1)
    for image, (row, column) in zip(batch[1:], corners, strict=True):
        rows = slice(height - height // 8, height) if row else slice(height // 8)
        columns = slice(width - width // 8, width) if column else slice(width // 8)
        image[:, rows, columns] += 3.0
    with model.watch(model.features) as watch:
        watch(batch)
        layout = model.layers[model.features].layout
        assert layout is not None
        maps = to_map(watch[model.features], layout)
    moved = (maps[1:] - maps[:1]).square().sum(1)  # [corners, h, w]
    _, h, w = moved.shape
    for change, (row, column) in zip(moved, corners, strict=True):
        top, left = divmod(int(change.argmax()), w)
        assert (top > (h - 1) / 2, left > (w - 1) / 2) == (bool(row), bool(column)), (top, left, h, w)


def test_forward_order_and_sizes_of_a_resnet() -> None:
    layers = tl.load("timm/resnet18", pretrained=False).layers
    names = list(layers)
    order = ["conv1", "maxpool", "layer1.0.conv1", "layer1.0", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert sorted(order, key=names.index) == order
    assert [layers[f"layer{n}"].size for n in (1, 2, 3, 4)] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [layers[f"layer{n}"].channels for n in (1, 2, 3, 4)] == [64, 128, 256, 512]
    assert layers["fc"].layout == Layout("vector", 1000)
    assert layers["fc"].size is None
    assert not layers["fc"].spatial


def test_a_rectangular_input_other_than_the_models_own() -> None:
    model = tl.load("timm/resnet18", pretrained=False)
    assert model.features_at((3, 64, 160)) == "layer4"
    assert model.layer("layer4", (3, 64, 160)).size == (2, 5)
    assert model.layer("layer4").size == (7, 7)
    for method in ("grad_cam", "cam"):
        result = tl.explain(model, torch.randn(2, 3, 64, 160), method=method)
        assert result.values.shape == (2, 2, 5)
        assert result.upsample().shape == (2, 64, 160)


class Branching(nn.Module):
    """A side branch runs last and reaches nothing; what does reach the output goes through functions of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.gate, self.fc, self.side = nn.Linear(4, 4), nn.Linear(8, 5), nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        second = self.b(first).relu_()
        second = second * self.gate(second.mean((2, 3)))[:, :, None, None].sigmoid()
        parts = torch.zeros(len(x), 8)
        parts[:, :4] = torch.cat([first, second], 1).mean((2, 3))[:, 4:]
        logits: Tensor = self.fc(parts)
        self.side(x)
        return logits


def test_the_default_layer_and_the_classifier_lead_to_the_output() -> None:
    model = Handle(Branching(), Spec(input_size=(3, 16, 16)))
    trace = model.trace()
    assert list(trace.layers) == ["a", "b", "gate", "fc", "side"]
    assert [name for name in trace.layers if trace.leads(name)] == ["a", "b", "gate", "fc"]
    assert trace.leads("a", "b")
    assert not trace.leads("b", "side")
    assert model.features == "b"
    assert model.embedding == "fc.in"
    assert tl.explain(model, torch.randn(1, 3, 16, 16)).values.any()


def test_a_detour_that_hides_where_a_tensor_came_from_is_found_by_its_gradient() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 2)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.side, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            features = self.conv(x)
            self.side(x)
            logits: Tensor = self.fc(Double.apply(features).mean((2, 3)))
            return logits

    model = Handle(Hidden(), Spec(input_size=(3, 16, 16)))
    assert not model.trace().leads("conv")
    assert model.features == "conv"


def test_the_default_layer_in_the_common_case_takes_no_forward_pass_of_its_own() -> None:
    model = tl.load("timm/resnet18", pretrained=False, input_size=(3, 64, 64))
    model.trace()
    before = model.forwards
    assert model.features == "layer4"
    assert model.features_at((3, 64, 64), "layer4.1.conv2") == "layer4.1.act1"
    assert model.forwards == before


def test_hieras_tokens_are_in_their_places() -> None:
    model = tl.load("timm/hiera_tiny_224", pretrained=False, img_size=96)
    layers = model.layers
    assert layers["unroll"].layout == Layout("tokens", 96, (24, 24), unrolled=((2, 2), (2, 2), (2, 2)))
    assert layers["blocks.0.mlp.fc1"].layout == Layout("tokens", 384, (24, 24), unrolled=((2, 2), (2, 2), (2, 2)))
    assert layers["blocks.1"].layout == Layout("tokens", 192, (12, 12), unrolled=((2, 2), (2, 2)))
    assert layers["blocks.11"].layout == Layout("tokens", 768, (3, 3))
    assert model.features == "blocks.11"
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        _, stages = model.module.eval().forward_intermediates(x)
    with model.watch("blocks.0", "blocks.2", "blocks.9", "blocks.11") as watch:
        watch(x)
        for name, expected in zip(("blocks.0", "blocks.2", "blocks.9", "blocks.11"), stages, strict=True):
            assert torch.equal(watch.map(name), expected)
    assert tl.explain(model, x, layer="blocks.2", method="ablation_cam").values.shape == (1, 12, 12)


def test_blocks_of_tokens_state_no_map() -> None:
    layers = tl.load("timm/nest_tiny", pretrained=False, img_size=64).layers
    assert {layer.layout for name, layer in layers.items() if ".transformer_encoder" in name} == {None}
    assert layers["levels.1"].layout == Layout("nchw", 192, (8, 8))


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("davit_tiny", {"input_size": (3, 96, 96)}, "stages.2.blocks.0.0.attn.qkv"),  # 7 by 7 windows, padded
        ("efficientformerv2_s0", {"img_size": 96}, "stages.2.blocks.4.token_mixer.talking_head1"),  # over heads
        ("nextvit_small", {"input_size": (3, 64, 64)}, "stages.2.blocks.4.e_mhsa.k"),  # pooled along the row
        ("efficientvim_m1", {"input_size": (3, 96, 96)}, "stages.0.blocks.0.mixer.hz_proj"),  # hidden states
        ("efficientvit_b0", {"input_size": (3, 96, 96)}, "stages.2.blocks.1.context_module.main.kernel_func"),
    ],
)
def test_what_only_looks_like_a_map_has_no_layout(name: str, options: dict[str, Any], layer: str) -> None:
    assert tl.load(f"timm/{name}", pretrained=False, **options).layers[layer].layout is None


@pytest.mark.parametrize(
    ("name", "size", "layer", "expected"),
    [
        ("pvt_v2_b0", 128, "stages.0.blocks.1.mlp.relu", Layout("nchw", 256, (32, 32))),
        ("regnetx_002", 96, "s1.b1.conv2.bn.act", Layout("nchw", 24, (24, 24))),
        ("maxvit_pico_rw_256", 128, "stages.0.blocks.0.attn_block.norm1", Layout("nhwc", 32, (32, 32))),
    ],
)
def test_maps_as_high_and_wide_as_they_have_channels(name: str, size: int, layer: str, expected: Layout) -> None:
    model = tl.load(f"timm/{name}", pretrained=False, **({"img_size": size} if "maxvit" in name else {}))
    assert model.layer(layer, (3, size, size)).layout == expected
    if name == "pvt_v2_b0":  # [N, 32, 32, 32] went in, and comes out in another order
        assert model.layer("stages.0", (3, size, size)).layout is None


def test_what_counts_as_inside_attention() -> None:
    kinds = {"blocks.0": "Block", "blocks.0.attn": "Attention", "m": "MultiheadAttention", "attn_blocks.0": "Block"}
    assert is_inside_attention("blocks.0.attn.qkv", kinds)
    assert is_inside_attention("m.out_proj", kinds)
    assert not is_inside_attention("blocks.0.attn", kinds)  # its output is a map like any other
    assert not is_inside_attention("blocks.0.norm1", kinds)
    assert not is_inside_attention("stage.0.norm1", {"stage.0": "ClassAttentionBlock"})
    assert not is_inside_attention("attn_blocks.0.norm1", kinds)  # a stage of attention blocks is not attention


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()
        self.unused = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.b(self.relu(self.a(x)))).relu()
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_calls_inputs_and_layers_that_do_not_run() -> None:
    model = Handle(Twice(), Spec(input_size=(3, 16, 16)))
    assert list(model.layers) == ["a", "b", "relu", "fc"]
    assert model.layers["relu"].calls == 2
    assert (model.layer("relu#1").channels, model.layer("relu#1").size) == (4, (8, 8))
    assert (model.layer("relu#2").channels, model.layer("relu").channels) == (6, 6)
    assert (model.layer("b.in").channels, model.layer("b.in").size) == (4, (8, 8))
    assert model.layer("fc.in").layout == Layout("vector", 6)
    assert model.trace().rectified == 3
    assert model.outputs == 5
    with pytest.raises(UnknownName, match="that runs in the forward pass"):
        model.layer("unused")


def test_layouts_may_be_stated() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x.flatten(1)[:, : 7 * 6].view(-1, 7, 6))  # a class token and 2 x 3 patches
            logits: Tensor = self.fc(x[:, 0] + x.mean(1))
            return logits

    plain = tl.wrap(Odd(), input_size=(3, 9, 9))
    assert plain.layers["body"].layout is None
    told = tl.wrap(Odd(), input_size=(3, 9, 9), layouts={"body": Layout("tokens", 6, (2, 3), 1)})
    assert told.layers["body"].size == (2, 3)
    assert tl.explain(told, torch.randn(1, 3, 9, 9), layer="body").values.shape == (1, 2, 3)


def test_a_changed_structure_is_traced_anew() -> None:
    net = Twice()
    first = Handle(net, Spec(input_size=(3, 16, 16)))
    assert first.outputs == 5
    net.fc = nn.Linear(6, 9)
    assert first.outputs == 9
    assert Handle(net, Spec(input_size=(3, 16, 16))).outputs == 9


def test_no_spatial_layer_and_no_input_size_say_what_to_do() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(NotApplicable, match="saliency"):
        _ = Handle(flat, Spec(input_size=(3, 2, 2))).features
    with pytest.raises(BadInput, match=r"input_size=\(3, H, W\)"):
        _ = Handle(flat, Spec()).layers


def test_an_error_inside_the_model_says_on_what_input() -> None:
    model = Handle(Twice(), Spec(input_size=(4, 16, 16)))
    with pytest.raises(RuntimeError) as caught:
        _ = model.layers
    assert "[4, 16, 16]" in "".join(caught.value.__notes__)
