"""`tl.weights`: a layer's own filters against its parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.specimens import SPECIMENS


def wrapped(*layers: nn.Module, size: tuple[int, int, int] | None = (3, 12, 10), **facts: Any) -> tl.Handle:
    torch.manual_seed(0)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return tl.wrap(nn.Sequential(*layers), input_size=size, **facts)


def unsorted(weight: Tensor, inputs: Tensor, images: Tensor) -> None:
    """Each image of a filter is its weight on the input channel it is said to be, one at a time."""
    for filter, (numbers, maps) in enumerate(zip(inputs.tolist(), images, strict=True)):
        assert sorted(numbers) == list(range(len(numbers)))
        for number, one in zip(numbers, maps, strict=True):
            assert torch.equal(one, weight[filter, number])


# -- what is read -----------------------------------------------------------------------------------------------------


def test_first_filters_are_colours_raw_and_in_order() -> None:
    model = tl.load("demo")
    found = tl.weights(model, "conv1")
    assert found.colour and found.scale == "shared" and found.to is None
    assert torch.equal(found.images, model.module.conv1.weight)
    assert found.images.data_ptr() != model.module.conv1.weight.data_ptr()
    assert found.inputs.tolist() == [[0, 1, 2]] * 24
    assert found.channels == tuple(range(24)) and len(found) == 24
    assert found.diagnostics["kind"] == "Conv2d 3 to 24, 5x5"
    assert (found.method, found.backend, found.names) == ("weights", "native", ())


def test_deeper_filters_are_maps_sorted_by_norm() -> None:
    model = tl.load("demo")
    found = tl.weights(model, "layer3.conv2")
    weight = model.module.layer3.conv2.weight.detach()
    assert not found.colour and found.images.shape == (96, 96, 3, 3)
    norms = found.images.flatten(2).norm(dim=2)
    assert (norms.diff(dim=1) <= 0).all() and norms[0, 0] > norms[0, -1]
    unsorted(weight, found.inputs, found.images)
    assert torch.equal(found.in_order(), weight)


def test_some_channels_in_the_order_asked() -> None:
    model = tl.load("demo")
    weight = model.module.conv1.weight
    found = tl.weights(model, "conv1", channels=[5, 2])
    assert found.channels == (5, 2) and torch.equal(found.images, weight[[5, 2]])
    assert tl.weights(model, "conv1", channels=7).channels == (7,)
    assert tl.weights(model, "conv1", channels=torch.tensor([3, 1])).channels == (3, 1)


def test_the_rows_of_the_head_are_named_by_class() -> None:
    model = tl.load("demo")
    found = tl.weights(model, "fc", channels=[3, 0])
    assert torch.equal(found.images, model.module.fc.weight[[3, 0]])
    assert found.names == (model.classes[3], model.classes[0])
    assert torch.equal(found.inputs, torch.arange(128).expand(2, -1))
    assert torch.equal(found.in_order(), found.images)
    assert tl.weights(model, "layer4.conv2", channels=[3, 0]).names == ()
    specimen = SPECIMENS["depthwise"]()[0]  # whose classifier is a 1x1 convolution
    assert tl.weights(specimen, "fc").names == specimen.classes


def test_grouped_and_depthwise_filters_name_their_own_input_channels() -> None:
    model = wrapped(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4))
    grouped = tl.weights(model, "1")
    assert grouped.images.shape == (4, 3, 3, 3) and "2 groups" in grouped.diagnostics["kind"]
    assert [sorted(row) for row in grouped.inputs.tolist()] == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert torch.equal(grouped.in_order(), model.module[1].weight)
    depthwise = tl.weights(model, "2")
    assert depthwise.images.shape == (8, 1, 3, 3)
    assert depthwise.inputs.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    probe = torch.zeros(1, 4, 3, 3)
    probe[0, 2] = 1  # what channel 2 drives says which filters read it
    driven = model.module[2](probe) - model.module[2](torch.zeros(1, 4, 3, 3))
    assert driven.flatten().nonzero().flatten().tolist() == [4, 5]


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_filters_are_read_by_output_channel(groups: int) -> None:
    model = wrapped(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False))
    found = tl.weights(model, "1")
    up = model.module[1]
    assert found.images.shape == (6, 4 // groups, 3, 3)
    for channel in range(4):  # an impulse in a channel shows its kernel in every output
        impulse = torch.zeros(1, 4, 1, 1)
        impulse[0, channel] = 1
        shown = up(impulse)[0]
        for filter in range(6):
            where = (found.inputs[filter] == channel).nonzero().flatten()
            expected = found.images[filter, where[0]] if len(where) else torch.zeros(3, 3)
            torch.testing.assert_close(shown[filter], expected)


def test_one_by_one_filters() -> None:
    model = tl.load("demo")
    found = tl.weights(model, "layer2.downsample.0")
    assert found.images.shape == (64, 32, 1, 1)
    assert torch.equal(found.in_order(), model.module.layer2.downsample[0].weight)


def test_a_module_with_one_weight_layer_stands_for_it() -> None:
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    found = tl.weights(module, "patch_embed")
    assert found.layer == "patch_embed.proj" and found.colour
    assert torch.equal(found.images, module.patch_embed.proj.weight)


def test_weights_are_those_the_layer_works_with() -> None:
    """Weight standardisation and weight norm change the parameter on its way into the convolution."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, self.stride)

    model = wrapped(Standardised(3, 4, 3), parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    images = tl.weights(model, "0").images
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.zeros(4), atol=1e-6, rtol=0)
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(F.conv2d(x, images, model.module[0].bias), model.module[0](x))
    assert torch.equal(tl.weights(model, "1").in_order(), model.module[1].weight)


def test_which_first_layers_are_in_colour() -> None:
    assert tl.weights(SPECIMENS["plain"]()[0], "conv1").colour
    gray = tl.weights(SPECIMENS["grayscale"]()[0], "conv1")
    assert not gray.colour and gray.images.shape == (8, 1, 3, 3)
    narrow = wrapped(nn.Conv2d(3, 3, 3, stride=2), nn.Conv2d(3, 5, 3))
    assert tl.weights(narrow, "0").colour
    assert not tl.weights(narrow, "1").colour  # three channels, but not those of the picture
    assert not tl.weights(wrapped(nn.Conv2d(3, 6, 3, groups=3)), "0").colour
    nowhere = wrapped(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 5, 3), size=None)
    assert [tl.weights(nowhere, name).colour for name in "01"] == [True, False]


def test_an_input_size_is_not_needed_for_a_layers_own_weights() -> None:
    model = wrapped(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 3), size=None, classes=["a", "b", "c"])
    assert tl.weights(model, "0").colour
    head = tl.weights(model, "2")
    assert head.images.shape == (3, 7) and head.names == ("a", "b", "c")


def test_a_layer_on_a_flattened_map_is_read_as_maps() -> None:
    model = wrapped(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(4 * 5 * 4, 6))
    found = tl.weights(model, "5")
    assert found.images.shape == (6, 4, 5, 4) and found.diagnostics["flattened"] == "2"
    assert "over the map of 2, flattened" in found.figure()._suptitle.get_text()
    x = torch.randn(1, 4, 5, 4)
    expected = (found.in_order() * x).sum((1, 2, 3)) + model.module[5].bias
    torch.testing.assert_close(model.module[5](x.flatten(1))[0], expected)


def test_a_flattened_map_with_channels_last_is_turned() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.fc = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8 * 6 * 5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.stem(x).permute(0, 2, 3, 1)).flatten(1))

    model = wrapped(Last())
    found = tl.weights(model, "0.fc")
    assert found.images.shape == (4, 8, 6, 5) and found.diagnostics["flattened"] == "0.norm"
    raw = torch.randn(1, 6, 5, 8)
    expected = (found.in_order() * raw.permute(0, 3, 1, 2)).sum((1, 2, 3)) + model.module[0].fc.bias
    torch.testing.assert_close(model.module[0].fc(raw.flatten(1))[0], expected)


def test_a_linear_layer_on_the_picture_itself_is_in_colour() -> None:
    model = wrapped(nn.Flatten(), nn.Linear(3 * 12 * 10, 5))
    found = tl.weights(model, "1")
    assert found.colour and torch.equal(found.images, model.module[1].weight.view(5, 3, 12, 10))


def test_rows_stay_rows_where_the_input_is_no_flattened_map() -> None:
    """The numbers fit, but the values are others: the forward pass tells."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * 2

    model = wrapped(nn.Conv2d(3, 4, 3), Scaled(), nn.Linear(4 * 10 * 8, 5))
    found = tl.weights(model, "2")
    assert torch.equal(found.images, model.module[2].weight) and "flattened" not in found.diagnostics


def test_half_precision_and_training_models() -> None:
    module = SPECIMENS["residual"]()[0].module.bfloat16().train()
    found = tl.weights(tl.wrap(module, input_size=(3, 32, 32)), "layer1.conv1")
    assert found.images.dtype == torch.float32
    assert torch.equal(found.in_order(), module.layer1.conv1.weight.float())
    assert module.training


# -- the result -------------------------------------------------------------------------------------------------------


def test_scales_are_shared_or_each_filters_own() -> None:
    model = tl.load("demo")
    shared, each = tl.weights(model, "layer2.conv1"), tl.weights(model, "layer2.conv1", scale="each")
    assert torch.equal(shared.images, each.images)  # raw in any case
    torch.testing.assert_close(shared.normalize(), shared.images / shared.images.abs().max())
    for one, raw in zip(each.normalize(), each.images, strict=True):
        torch.testing.assert_close(one, raw / raw.abs().max())
    torch.testing.assert_close(shared.normalize(scale="each"), each.normalize())
    low = shared.normalize("minmax")
    assert (low.min(), low.max()) == (0, 1) and shared.normalize("none") is shared.images
    assert each.normalize("minmax").flatten(1).amin(1).eq(0).all()


def test_weights_of_zero_are_drawn_and_scaled() -> None:
    model = wrapped(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    nn.init.zeros_(model.module[0].weight)
    nn.init.zeros_(model.module[1].weight)
    for name in "01":
        for scale in ("shared", "each"):
            found = tl.weights(model, name, scale=scale)
            assert (found.normalize() == 0).all() and (found.normalize("minmax") == 0).all()
            assert found._repr_png_()


@pytest.mark.parametrize(("layer", "to"), [("conv1", None), ("fc", None), ("layer2.conv1", "conv1")])
def test_what_is_saved_comes_back(tmp_path: Path, layer: str, to: str | None) -> None:
    found = tl.weights("demo", layer, to=to, channels=[0, 3])
    again = tl.open(found.save(tmp_path / "one"))
    assert isinstance(again, tl.Filters)
    for name in found.__dataclass_fields__:
        before, after = getattr(found, name), getattr(again, name)
        if isinstance(before, Tensor):
            assert torch.equal(before, after), name
        elif name != "diagnostics":
            assert before == after, name
    assert again.figure()


def test_nothing_is_left_behind() -> None:
    handle, _ = SPECIMENS["inplace"]()
    handle.module.train()
    before = Snapshot(handle.module)
    tl.weights(handle, "conv2")
    tl.weights(handle, "fc")
    tl.weights(handle, "conv3", to="conv1")
    with pytest.raises(BadInput):
        tl.weights(handle, "conv1", to="conv3")
    assert before.differences() == []


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda m: tl.weights(m, "layer9"), UnknownName, "no layer 'layer9'; did you mean 'layer4'"),
        (lambda m: tl.weights(m, ""), UnknownName, "no layer ''"),
        (lambda m: tl.weights(m, "layer1"), BadInput, "holds 3 layers with weights; name one of them: 'layer1.conv1'"),
        (lambda m: tl.weights(m, "layer1.bn1"), NotApplicable, r"\(BatchNorm2d\) holds no filters.*: 'layer1.conv1'"),
        (lambda m: tl.weights(m, "relu"), NotApplicable, "holds no filters"),
        (lambda m: tl.weights(m, "conv1", channels=[24]), BadInput, "has channels 0 to 23; got 24"),
        (lambda m: tl.weights(m, "conv1", channels=[-1]), BadInput, "got -1"),
        (lambda m: tl.weights(m, "conv1", channels=[]), BadInput, "no channels were given"),
        (lambda m: tl.weights(m, "conv1", channels="3"), BadInput, "whole numbers"),
        (lambda m: tl.weights(m, "conv1", channels=1.5), BadInput, "whole numbers"),
        (lambda m: tl.weights(m, "conv1", scale="own"), BadInput, '"shared" or "each"; got \'own\''),
        (lambda m: tl.weights(m, "conv1").normalize("l2"), BadInput, "got 'l2'"),
        (lambda m: tl.weights(m, "conv1").normalize(scale="own"), BadInput, "got 'own'"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(
    ask: Callable[[tl.Handle], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ask(tl.load("demo"))
