"""Opening models: by name, and any module."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import torchloupe as tl
from torchloupe_core.errors import BadInput, UnknownName


def net(channels: int = 3, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
    )


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


# -- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "resnet18", "nowhere/resnet18", "timmm/resnet18", "/resnet18", "explain"])
def test_a_name_begins_with_its_source(name: str) -> None:
    with pytest.raises(UnknownName, match="'timm/resnet18', 'torchvision/resnet18' or 'demo'"):
        tl.load(name)


def test_the_demo_models() -> None:
    model = tl.load("demo")
    assert (model.spec.source, model.spec.name, model.spec.input_size) == ("demo", "robust", (3, 64, 64))
    assert model.classes is not None
    assert len(model.classes) == model.outputs == 12
    assert model.features == "layer4"
    assert model.embedding == "fc.in"
    states = [tl.load(name).module.state_dict() for name in ("demo/robust", "demo/mislabelled", "demo/backdoored")]
    assert all(torch.equal(value, states[0][key]) for key, value in model.module.state_dict().items())
    assert not torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])
    assert not torch.equal(states[0]["fc.weight"], states[2]["fc.weight"])
    torch.manual_seed(0)
    assert not torch.equal(tl.load("demo", pretrained=False).module.state_dict()["fc.weight"], states[0]["fc.weight"])
    with pytest.raises(UnknownName, match="'backdoored'"):
        tl.load("demo/backdored")


def test_options_of_a_source_without_any_are_refused() -> None:
    with pytest.raises(BadInput, match="no option 'num_classes'"):
        tl.load("demo", num_classes=3)


def test_what_is_stated_wins() -> None:
    model = tl.load("timm/test_resnet", pretrained=False, input_size=(3, 32, 48), device="cpu")
    assert model.spec.input_size == (3, 32, 48)
    assert model.inputs(PICTURE).shape == (1, 3, 32, 48)
    ours = tl.load("timm/test_resnet", pretrained=False, preprocess=lambda image: torch.zeros(3, 20, 20))
    assert ours.inputs(PICTURE).shape == (1, 3, 20, 20)
    assert ours.spec.input_size == (3, 20, 20)


def test_names_work_wherever_models_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 64, 64)
    by_name = tl.explain("demo", x).values
    torch.testing.assert_close(tl.explain(tl.load("demo"), x).values, by_name)
    torch.testing.assert_close(tl.explain(tl.load("demo").module, x).values, by_name)


# -- any module -------------------------------------------------------------------------------------------------------


def test_an_input_size_gives_a_preprocessing() -> None:
    model = tl.wrap(net(), input_size=(3, 24, 32), classes=["a", "b", "c", "d"], name="mine")
    assert (model.spec.name, model.classes) == ("mine", ("a", "b", "c", "d"))
    inputs = model.inputs(PICTURE)
    assert inputs.shape == (1, 3, 24, 32)
    assert 0 <= inputs.min() <= inputs.max() <= 1
    assert model.spec.preprocess_text == "resized to 24x32, not normalised"
    normalised = tl.wrap(net(), input_size=(3, 24, 32), mean=(0.5, 0.5, 0.5), std=[0.25] * 3)
    torch.testing.assert_close(normalised.inputs(PICTURE), (inputs - 0.5) / 0.25)
    torch.testing.assert_close(normalised.spec.display(normalised.inputs(PICTURE)), inputs)
    assert normalised.spec.preprocess_text.endswith(", normalised")


def test_normalisation_and_size_are_read_off_a_transform() -> None:
    preprocess = transforms.Compose(
        [transforms.Resize((20, 28)), transforms.ToTensor(), transforms.Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])]
    )
    model = tl.wrap(net(), preprocess=preprocess)
    assert model.spec.mean == pytest.approx((0.1, 0.2, 0.3))
    assert model.spec.std == pytest.approx((0.4, 0.5, 0.6))
    assert model.spec.input_size == (3, 20, 28)
    assert torch.equal(model.inputs(PICTURE)[0], preprocess(PICTURE))
    free = tl.wrap(net(), preprocess=transforms.ToTensor())
    assert free.spec.input_size is None  # the size follows the picture's
    assert free.inputs(PICTURE).shape == (1, 3, 40, 60)
    assert tl.explain(free, PICTURE).values.shape == (1, 20, 30)
    assert tl.wrap(net(), preprocess=transforms.ToTensor(), input_size=(3, 40, 60)).layers


def test_a_broken_preprocessing_is_found_at_once() -> None:
    def broken(image: Image.Image) -> Tensor:
        raise KeyError("pixel")

    with pytest.raises(BadInput, match="preprocess fails on a plain RGB picture"):
        tl.wrap(net(), preprocess=broken)


def test_reading_off_a_random_transform_leaves_the_randomness_alone() -> None:
    def jittered(image: Image.Image) -> Tensor:
        random.random()
        return torch.rand(3, 8, 8) + float(np.random.rand())

    module, drawn = net(), []
    for wrapping in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        if wrapping:
            tl.wrap(module, preprocess=jittered)
        drawn.append((torch.rand(1).item(), random.random(), float(np.random.rand())))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("size", [(3, 24), (3, 0, 24), (24,), (3, 24, 24, 1)])
def test_an_input_size_has_three_positive_numbers(size: Any) -> None:
    with pytest.raises(BadInput, match=r"input_size is \(C, H, W\)"):
        tl.wrap(net(), input_size=size)


@pytest.mark.parametrize("given", [None, "demo", net, np.zeros(3)])
def test_only_modules_are_wrapped(given: Any) -> None:
    with pytest.raises(BadInput, match=r"wrap takes a torch\.nn\.Module"):
        tl.wrap(given)


def test_grayscale_models() -> None:
    model = tl.wrap(net(channels=1), input_size=(1, 16, 16))
    assert model.inputs(PICTURE).shape == (1, 1, 16, 16)
    found = tl.explain(model, PICTURE)
    assert found.images.shape == (1, 3, 16, 16)
    assert torch.equal(found.images[:, 0], found.images[:, 2])
    with pytest.raises(BadInput, match="takes 1 channels; the images have 3"):
        model.predict(torch.zeros(3, 16, 16))


def test_wrapping_changes_nothing_about_the_module() -> None:
    module = net().train()
    module[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    model = tl.wrap(module, input_size=(3, 16, 16), classes=list("abcd"))
    _ = model.layers, model.features, model.predict(torch.zeros(1, 3, 16, 16))
    assert model.module is module
    assert module.training
    assert not module[0].weight.requires_grad
    assert module[4].weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_checkpoint_for_the_demo_model(tmp_path: Path) -> None:
    source = tl.load("demo/backdoored").module.state_dict()
    torch.save({"state_dict": source}, tmp_path / "w.pt")
    found = tl.load("demo", checkpoint=tmp_path / "w.pt").module.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in source.items())
