"""torchvision models: names, weights, and what is read off them."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import models

import torchloupe as tl
from torchloupe_core.errors import BadInput, UnknownName


def picture() -> Image.Image:
    values = torch.randint(0, 255, (120, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(values.numpy())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_a_model_comes_with_its_weights_own_facts(name: str) -> None:
    model = tl.load(f"torchvision/{name}", pretrained=False)
    preset = models.get_model_weights(name).DEFAULT.transforms()
    assert not model.module.training
    assert (model.spec.source, model.spec.name, model.spec.input_size) == ("torchvision", name, (3, 224, 224))
    assert torch.equal(model.inputs(picture())[0], preset(picture()))
    assert model.spec.mean == tuple(preset.mean)
    assert model.classes is not None
    assert (len(model.classes), model.classes[0], model.classes[207]) == (1000, "tench", "golden retriever")
    assert not model.spec.fixed_size


def test_the_preprocessing_follows_the_weights() -> None:
    sizes = {"IMAGENET1K_V1": 224, "IMAGENET1K_SWAG_E2E_V1": 384}
    for weights, size in sizes.items():
        preset = models.ViT_B_16_Weights[weights].transforms()
        assert preset.crop_size == [size]
    with pytest.raises(UnknownName, match="'IMAGENET1K_V1'"):
        tl.load("torchvision/resnet18", weights="IMAGENET1K_V3")


def test_classes_given_size_the_head() -> None:
    model = tl.load("torchvision/resnet18", pretrained=False, classes=["cat", "dog"])
    assert model.classes == ("cat", "dog")
    assert model.trace().outputs == 2
    assert tl.load("torchvision/resnet18", pretrained=False, num_classes=7).classes is None


def test_unknown_names_and_options() -> None:
    with pytest.raises(UnknownName, match="'resnet18'"):
        tl.load("torchvision/resnet17", pretrained=False)
    with pytest.raises(BadInput, match="'nonsense'"):
        tl.load("torchvision/resnet18", pretrained=False, nonsense=3)


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("Name or service not known"), TimeoutError("timed out"), OSError("disk full")]
)
def test_without_network_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", failing)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", failing)
    with pytest.raises(BadInput) as caught:
        tl.load("torchvision/resnet18")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("torchvision/resnet18", "checkpoint=", "pretrained=False", str(error)):
        assert part in message


def test_a_checkpoint_replaces_the_pretrained_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    other = models.mobilenet_v3_small(num_classes=4)
    torch.save(other.state_dict(), tmp_path / "mine.pt")
    model = tl.load("torchvision/mobilenet_v3_small", checkpoint=tmp_path / "mine.pt", classes=list("abcd"))
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


def test_bare_torchvision_modules_are_recognised() -> None:
    model = tl.wrap(models.resnet18())
    assert (model.spec.source, model.spec.name, model.spec.input_size) == ("torchvision", "ResNet", (3, 224, 224))
    assert (model.classes or ())[207] == "golden retriever"
    assert tl.wrap(models.resnet18(num_classes=3)).classes is None
    assert tl.wrap(models.inception_v3(init_weights=False)).spec.input_size == (3, 299, 299)
    vit = models.VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    wrapped = tl.wrap(vit)
    assert wrapped.spec.input_size == (3, 64, 64)
    assert wrapped.spec.fixed_size
    assert wrapped.spec.prefix == 1
    assert wrapped.features == "encoder.layers.encoder_layer_1.ln_1"
    layout = wrapped.layers[wrapped.features].layout
    assert layout == tl.Layout("tokens", 32, (4, 4), 1)
    with pytest.raises(BadInput, match=r"\[3, 64, 64\] only"):
        wrapped.predict(torch.randn(1, 3, 96, 96))


def test_inputs_of_another_number_of_channels() -> None:
    module = models.resnet18()
    module.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model = tl.wrap(module, input_size=(1, 64, 64))
    assert model.inputs(picture()).shape == (1, 1, 64, 64)
    assert len(model.spec.mean or ()) == len(model.spec.std or ()) == 1
    grey = Image.new("L", (8, 8), 128)
    torch.testing.assert_close(model.spec.display(model.inputs(grey)), torch.full((1, 3, 64, 64), 128 / 255))
    assert model.predict(picture())
