"""Receptive fields of torchvision's families: published numbers, and the gradient of the linearised networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import torchloupe as tl
from linearised import Truth
from torchloupe_core import receptive
from torchloupe_core.handle import Handle

SIZE = (3, 96, 65)


PUBLISHED = {
    "vgg16": {"features.28": (196, 16, 90), "features.30": (212, 32, 90)},
    "alexnet": {"features.12": (195, 32, 66)},
    "resnet50": {"conv1": (7, 2, 3), "layer1": (35, 4, 17), "avgpool": (224, 0, 0)},
    "resnet18": {"layer4": (435, 32, 217)},
    "inception_v3": {"Mixed_7c": (1311, 32, 618)},
    "mobilenet_v3_small": {"features.4": (224, 0, 0)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    """Of VGG-16 and Inception v3 as in the table of Araujo, Norris and Sim 2019."""
    options = {"init_weights": False} if name in ("inception_v3", "vgg16") else {}
    handle = tl.load(f"torchvision/{name}", pretrained=False, **options)
    for layer, expected in PUBLISHED[name].items():
        field = receptive.fields(handle, layer).of()
        assert (field.size, field.stride, field.padding) == expected
        assert field.regular and not field.measured


def family(name: str, **options: bool) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, **options)


def headless(name: str) -> nn.Module:
    module = models.get_model(name, weights=None)
    module.classifier = nn.Identity()  # its weights are many and beside the point
    return module


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "alexnet": lambda: headless("alexnet"),
    "vgg": lambda: headless("vgg11_bn"),
    "resnet": family("resnet18"),
    "resnext": lambda: models.ResNet(Bottleneck, [2, 1, 1, 1], groups=8, width_per_group=4),
    "dilated": lambda: models.ResNet(Bottleneck, [1, 1, 2, 1], replace_stride_with_dilation=[False, True, True]),
    "densenet": lambda: models.DenseNet(8, (3, 3, 2), 16),
    "googlenet": family("googlenet", init_weights=False, aux_logits=False),
    "inception": family("inception_v3", init_weights=False),
    "mobilenet_v2": family("mobilenet_v2"),
    "mobilenet_v3": family("mobilenet_v3_small"),
    "mnasnet": family("mnasnet0_5"),
    "shufflenet": family("shufflenet_v2_x0_5"),
    "squeezenet": family("squeezenet1_0"),
    "regnet": family("regnet_y_400mf"),
    "efficientnet": family("efficientnet_b0"),
    "convnext": lambda: models.ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]),
    "swin": lambda: models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4]),
    "swin_v2": lambda: models.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
    ),
    "vit": lambda: models.VisionTransformer(64, 16, 2, 2, 32, 64),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_read_what_their_gradient_shows(name: str) -> None:
    """Corners, the middle and others, of layers all over the network, and channels where they differ."""
    torch.manual_seed(0)
    handle = tl.wrap(FAMILIES[name]())
    size = (3, 64, 64) if name == "vit" else (3, 129, 107) if name == "inception" else SIZE
    layers = [layer.name for layer in handle.trace(size).layers.values() if layer.spatial]
    layers = layers[:: max(1, len(layers) // 6)]
    truth = Truth(handle, layers, size)
    for layer in layers:
        found = receptive.fields(handle, layer, shape=size)
        assert not found.measured
        height, width = found.grid
        for row, col in {(0, 0), (height // 2, width // 2), (height - 1, width - 1), (height // 3, min(1, width - 1))}:
            assert found.of().clipped(row, col).box == truth.support(layer, row, col), (layer, row, col)
        for channel in torch.randint(found.channels, (4,)).tolist():
            field = found.of(channel) if found.distinct else found.of()
            place = height // 2, width // 2
            assert field.clipped(*place).box == truth.support(layer, *place, channel), (layer, channel)


def test_channels_of_shufflenet_and_densenet_differ() -> None:
    shuffle = tl.load("torchvision/shufflenet_v2_x0_5", pretrained=False)
    sizes = {receptive.fields(shuffle, "stage2").of(channel).size for channel in range(48)}
    assert len(sizes) > 2 and max(sizes) == receptive.fields(shuffle, "stage2").of().size  # type: ignore[type-var]
    block = receptive.fields(tl.wrap(FAMILIES["densenet"]()), "features.denseblock1")
    assert [block.of(channel).size for channel in (0, 16, 24, 32)] == [11, 19, 27, 35]


def test_without_squeeze_excite() -> None:
    """The field of the same network with its gates taken out."""
    handle = tl.load("torchvision/mobilenet_v3_small", pretrained=False)
    plain = tl.load("torchvision/mobilenet_v3_small", pretrained=False)
    for name, part in list(plain.module.named_modules()):
        if type(part).__name__ == "SqueezeExcitation":
            owner, _, last = name.rpartition(".")
            setattr(plain.module.get_submodule(owner), last, nn.Identity())
    for layer in ("features.1", "features.4", "features.8.block.1", "features.12"):
        ours, expected = receptive.fields(handle, layer, without_gates=True).of(), receptive.fields(plain, layer).of()
        assert (ours.size, ours.stride, ours.padding) == (expected.size, expected.stride, expected.padding)
        assert receptive.fields(handle, layer).of().size == 224


def test_a_vision_transformer_reads_everything_and_a_patch_without_attention() -> None:
    handle = tl.wrap(FAMILIES["vit"]())
    for layer in ("encoder.layers.encoder_layer_0", "encoder.ln"):
        whole, local = (receptive.fields(handle, layer, without_gates=one).of() for one in (False, True))
        assert (whole.size, whole.stride, whole.box(0, 3)) == (64, 0, (0, 0, 64, 64))
        assert (local.size, local.stride, local.padding, local.box(0, 3)) == (16, 16, 0, (0, 48, 16, 64))
    patch = receptive.fields(handle, "conv_proj").of()
    assert (patch.size, patch.stride, patch.padding) == (16, 16, 0)


@pytest.mark.parametrize("name", ["densenet201", "efficientnet_b4"])
def test_all_layers_of_a_large_network_within_five_seconds(name: str) -> None:
    handle = tl.load(f"torchvision/{name}", pretrained=False)
    begun = time.process_time()
    assert receptive.fields(handle, "features").of().size
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v3_small", "swin_t"])
def test_a_pass_without_numbers_sees_the_same_layers(name: str) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    handle: Handle = tl.load(f"torchvision/{name}", pretrained=False, **options)
    ours, real = receptive._run(handle, handle.input_shape, gates=True).trace, handle.trace()
    assert list(ours.layers) == list(real.layers) and ours.outputs == real.outputs
    for key, layer in real.calls.items():
        assert replace(ours.calls[key], passes=False) == replace(layer, passes=False)
