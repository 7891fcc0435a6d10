"""timm models: names, weights, and what is read off them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import torchloupe as tl
from torchloupe_core.errors import BadInput, UnknownName


def picture() -> Image.Image:
    values = torch.randint(0, 255, (120, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(values.numpy())


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "mobilenetv3_small_050.lamb_in1k"])
def test_a_model_comes_with_timms_own_facts(name: str) -> None:
    model = tl.load(f"timm/{name}", pretrained=False)
    config = resolve_model_data_config(model.module)
    assert type(model.module) is type(timm.create_model(name))
    assert not model.module.training
    assert (model.spec.source, model.spec.name) == ("timm", name)
    assert model.spec.input_size == config["input_size"]
    assert model.spec.mean == tuple(config["mean"])
    assert model.spec.std == tuple(config["std"])
    expected = create_transform(**config, is_training=False)(picture())
    assert torch.equal(model.inputs(picture())[0], expected)
    displayed = model.spec.display(expected[None])
    assert 0 <= displayed.min() <= displayed.max() <= 1


def test_imagenet_models_know_their_classes() -> None:
    classes = tl.load("timm/resnet18", pretrained=False).classes
    assert classes is not None
    assert len(classes) == 1000
    assert classes[0].startswith("tench")
    assert classes[207] == "golden retriever"
    assert tl.load("timm/resnet18", pretrained=False, num_classes=7).classes is None
    assert tl.load("timm/resnet18", pretrained=False, num_classes=7).outputs == 7


def test_classes_given_size_the_head() -> None:
    model = tl.load("timm/resnet18", pretrained=False, classes=["cat", "dog"])
    assert model.classes == ("cat", "dog")
    assert model.outputs == model.trace().outputs == 2


@pytest.mark.parametrize(("channels", "name"), [(1, "resnet18"), (4, "resnet18"), (1, "convnext_atto")])
def test_another_number_of_input_channels(channels: int, name: str) -> None:
    model = tl.load(f"timm/{name}", pretrained=False, in_chans=channels)
    assert model.spec.input_size is not None
    assert model.spec.input_size[0] == channels
    assert len(model.spec.mean or ()) == channels
    x = torch.randn(1, *model.spec.input_size)
    assert model.inputs(x).shape == x.shape
    with pytest.raises(BadInput, match=f"takes {channels} channels; the images have 3"):
        model.inputs(torch.randn(1, 3, 32, 32))
    if channels == 1:
        assert model.inputs(picture()).shape == (1, *model.spec.input_size)
        assert tl.explain(model, picture()).images.shape[1] == 3


def test_another_image_size_of_a_fixed_size_model() -> None:
    model = tl.load("timm/vit_tiny_patch16_224", pretrained=False, img_size=(64, 96), depth=1)
    assert model.spec.input_size == (3, 64, 96)
    assert model.inputs(picture()).shape == (1, 3, 64, 96)
    assert model.spec.fixed_size
    with pytest.raises(BadInput, match=r"\[3, 64, 96\] only; got \[3, 224, 224\]"):
        model.predict(torch.randn(1, 3, 224, 224))
    flexible = tl.load("timm/vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True, depth=1)
    assert flexible.predict(torch.randn(1, 3, 64, 96))
    assert not tl.load("timm/resnet18", pretrained=False).spec.fixed_size


def test_registers_and_class_tokens_are_stated() -> None:
    for name, prefix in (("vit_tiny_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5), ("resnet18", None)):
        options: dict[str, Any] = {"depth": 1, "img_size": 56} if name.startswith("vit") else {}
        if name == "vit_tiny_patch16_224":
            options["img_size"] = 64
        assert tl.load(f"timm/{name}", pretrained=False, **options).spec.prefix == prefix


def test_unknown_names_suggest_the_nearest() -> None:
    for given, near in (
        ("timm/resnet19", "'resnet18'"),
        ("timm/resnet18.a1_in2k", "'resnet18.a1_in1k'"),
        ("timm/", "such as"),
    ):
        with pytest.raises(UnknownName) as caught:
            tl.load(given, pretrained=False)
        assert near in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unknown_options_are_ours_to_report() -> None:
    with pytest.raises(BadInput, match=r"timm\.create_model\('resnet18'\) failed"):
        tl.load("timm/resnet18", pretrained=False, nonsense=3)


def test_without_network_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The host has no address: that is found out at once and not retried for a minute."""
    import socket

    from huggingface_hub import constants

    asked: list[Any] = []

    def nowhere(*address: Any, **options: Any) -> Any:
        asked.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    begun = time.perf_counter()
    with pytest.raises(BadInput) as caught:
        tl.load("timm/resnet18.a1_in1k")
    assert time.perf_counter() - begun < 10
    message = str(caught.value)
    assert "\n" not in message
    assert "timm/resnet18.a1_in1k" in message
    assert "checkpoint=" in message
    assert "pretrained=False" in message
    assert not constants.HF_HUB_OFFLINE
    asked.clear()
    tl.load("timm/resnet18", pretrained=False)
    assert asked == []  # random weights ask nobody


def test_a_download_that_fails_in_any_way_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("no such file\nand more"), OSError("disk full"), ConnectionError()):

        def failing(*given: Any, error: Exception = error, **options: Any) -> Any:
            raise error

        monkeypatch.setattr("torchloupe_adapters.timm._no_waiting_without_network", failing)
        with pytest.raises(BadInput, match="could not be fetched") as caught:
            tl.load("timm/resnet18")
        assert "\n" not in str(caught.value)


def test_a_checkpoint_replaces_the_pretrained_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    other = timm.create_model("test_resnet", num_classes=4)
    save_file(other.state_dict(), tmp_path / "mine.safetensors")
    model = tl.load("timm/test_resnet", checkpoint=tmp_path / "mine.safetensors", classes=list("abcd"))
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    with pytest.raises(BadInput, match=r"fc\.weight \[4, 96\], the model has \[1000, 96\]"):
        tl.load("timm/test_resnet", checkpoint=tmp_path / "mine.safetensors")


def test_bare_timm_modules_are_recognised() -> None:
    module = timm.create_model("test_resnet")
    for given in (module, nn.DataParallel(module)):
        model = tl.wrap(given)
        assert model.spec.source == "timm"
        assert model.spec.name == "test_resnet"
        assert model.spec.input_size == (3, 160, 160)
        assert len(model.classes or ()) == 1000
    ours = tl.wrap(module, input_size=(3, 64, 64), classes=list("ab"))
    assert ours.spec.input_size == (3, 64, 64)
    assert ours.classes == ("a", "b")
    assert ours.inputs(picture()).shape == (1, 3, 64, 64)
    assert tl.wrap(nn.Conv2d(3, 4, 1)).spec.source == "module"


def test_the_first_of_two_heads_is_the_classifier() -> None:
    model = tl.load("timm/deit_tiny_distilled_patch16_224", pretrained=False, img_size=64, depth=1)
    assert model.spec.classifier == "head"
    assert model.embedding == "head.in"


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("crossvit_tiny_240", "head.1"),
        ("efficientvim_m1_dist", "heads.3"),
        ("levit_128s", "head.linear"),
        ("volo_d1_224", "head"),
    ],
)
def test_of_heads_that_are_added_up_the_last_is_the_classifier(name: str, classifier: str) -> None:
    assert tl.load(f"timm/{name}", pretrained=False).spec.classifier == classifier


@pytest.mark.parametrize("channels", [1, 3])
def test_a_stem_that_folds_space_into_channels(channels: int) -> None:
    model = tl.load("timm/tresnet_m", pretrained=False, in_chans=channels)
    assert (model.spec.input_size or ())[0] == len(model.spec.mean or ()) == channels
    assert model.predict(torch.randn(1, channels, 64, 64))
