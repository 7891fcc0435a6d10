"""`tl.activations`: maps against the layer's own output, masks against a loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.specimens import SPECIMENS


@pytest.fixture(scope="module")
def scenes() -> Any:
    return tl.demo_scenes(3)


# -- maps -------------------------------------------------------------------------------------------------------------


def test_maps_are_what_the_layer_gives(scenes: Any) -> None:
    model = tl.load("demo")
    found = tl.activations(model, scenes.images, "layer1")
    module, x = model.module, model.inputs(scenes.images)
    with torch.no_grad():
        expected = module.layer1(module.relu(module.bn1(module.conv1(x))))
    assert torch.equal(found.maps, expected) and found.maps.shape == (3, 32, 32, 32)
    assert found.channels == tuple(range(32)) and found.layer == "layer1"
    torch.testing.assert_close(found.images, scenes.images.float() / 255)
    assert (found.masks, found.thresholds, found.threshold) == (None, None, "")
    assert (found.method, found.backend, found.forwards, len(found)) == ("activations", "native", 3, 3)


@pytest.mark.parametrize(
    ("specimen", "layer"), [("vit_registers", "blocks.1"), ("nhwc", "window_block"), ("concat", "norm")]
)
def test_maps_are_canonical_on_every_kind_of_model(specimen: str, layer: str) -> None:
    handle, inputs = SPECIMENS[specimen]()
    found = tl.activations(handle, inputs, layer, channels=[3, 1])
    with handle.watch(layer) as watch:
        watch(inputs)
        raw = watch[layer]
    if specimen == "vit_registers":  # five tokens first, then a grid of 4 x 6, row by row
        expected = torch.stack([raw[:, 5 + 6 * row : 11 + 6 * row] for row in range(4)], 1).permute(0, 3, 1, 2)
    else:
        expected = raw.permute(0, 3, 1, 2) if specimen == "nhwc" else raw
    assert torch.equal(found.maps, expected[:, [3, 1]]) and found.channels == (3, 1)


def test_batches_make_no_difference(scenes: Any) -> None:
    model = tl.load("demo")
    whole = tl.activations(model, scenes.images, "layer4", batch_size=3)
    single = tl.activations(model, scenes.images, "layer4", batch_size=1)
    torch.testing.assert_close(whole.maps, single.maps)
    assert single.forwards == whole.forwards == 3


def test_inputs_and_later_layers() -> None:
    handle, inputs = SPECIMENS["residual"]()
    assert tl.activations(handle, inputs, "fc.in").maps.shape == (3, 16, 1, 1)
    first = tl.activations(handle, inputs, "layer1.relu#1").maps
    assert not torch.equal(first, tl.activations(handle, inputs, "layer1.relu").maps)
    assert tl.activations(handle, inputs, "layer1", dtype=torch.float64).maps.dtype == torch.float32


# -- thresholds -------------------------------------------------------------------------------------------------------


def by_loop(maps: Tensor, thresholds: list[float], size: tuple[int, int]) -> Tensor:
    """Each map enlarged bilinearly by hand, then compared pixel by pixel."""
    count, channels, h, w = maps.shape
    masks = torch.zeros(count, channels, *size, dtype=torch.bool)
    for row in range(size[0]):
        y = min(max((row + 0.5) * h / size[0] - 0.5, 0), h - 1)
        for column in range(size[1]):
            x = min(max((column + 0.5) * w / size[1] - 0.5, 0), w - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = y - top, x - left
            upper = (1 - b) * maps[:, :, top, left] + b * maps[:, :, top, right]
            lower = (1 - b) * maps[:, :, bottom, left] + b * maps[:, :, bottom, right]
            masks[:, :, row, column] = (1 - a) * upper + a * lower > torch.tensor(thresholds)
    return masks


def agree(one: Tensor, other: Tensor) -> bool:
    return (one != other).float().mean().item() < 2e-4  # rounding at the threshold itself


def test_a_value_is_the_threshold_of_every_channel(scenes: Any) -> None:
    found = tl.activations("demo", scenes.images, "layer4", channels=[14, 17], threshold=2.5)
    assert found.thresholds is not None and found.thresholds.tolist() == [2.5, 2.5] and found.threshold == "2.5"
    assert found.masks is not None and found.masks.dtype == torch.bool and found.masks.shape == (3, 2, 64, 64)
    assert 0 < found.masks.float().mean() < 0.5
    assert agree(found.masks, by_loop(found.maps, [2.5, 2.5], (64, 64)))
    enlarged = F.interpolate(found.maps, (64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(found.upsample(), enlarged)


def test_a_quantile_is_each_channels_own_over_all_images(scenes: Any) -> None:
    found = tl.activations("demo", scenes.images, "layer4", channels=[14, 17, 36], threshold="95%")
    expected = [float(np.quantile(found.maps[:, place].numpy().ravel(), 0.95)) for place in range(3)]
    assert found.thresholds is not None and found.masks is not None
    torch.testing.assert_close(found.thresholds, torch.tensor(expected))
    assert len(set(expected)) == 3 and found.threshold == "95% quantile of 3 images"
    above = (found.maps > found.thresholds[:, None, None]).float().mean((0, 2, 3))
    torch.testing.assert_close(above, torch.full((3,), 0.05), atol=0.005, rtol=0)
    assert agree(found.masks, by_loop(found.maps, expected, (64, 64)))
    alone = tl.activations("demo", scenes.images[:1], "layer4", channels=14, threshold="95%")
    assert alone.thresholds is not None and alone.thresholds.item() != expected[0]


def test_values_from_elsewhere_one_for_each_channel(scenes: Any) -> None:
    scan = torch.linspace(0, 1, 128)  # as a pass over a data set would give
    every = tl.activations("demo", scenes.images, "layer4", threshold=scan)
    assert every.thresholds is not None and torch.equal(every.thresholds, scan)
    some = tl.activations("demo", scenes.images, "layer4", channels=[9, 4], threshold=scan)
    assert some.thresholds is not None and torch.equal(some.thresholds, scan[[9, 4]])
    own = tl.activations("demo", scenes.images, "layer4", channels=[9, 4], threshold=[0.5, 0.25])
    assert own.thresholds is not None and own.thresholds.tolist() == [0.5, 0.25]
    assert own.threshold == "a value for each channel"


def test_a_quantile_over_a_data_set() -> None:
    model, scenes = tl.load("demo"), tl.demo_scenes(40, seed=7)
    every = tl.activations(model, scenes.images, "layer4", channels=[14, 17])
    found = tl.activations(model, scenes.images[:2], "layer4", channels=[14, 17], threshold="99%", over=scenes)
    assert found.thresholds is not None and found.threshold == "99% quantile of 40 images"
    share = (every.maps <= found.thresholds[:, None, None]).float().mean((0, 2, 3))
    assert ((share - 0.99).abs() < 1e-3).all()
    alone = tl.activations(model, scenes.images[:2], "layer4", channels=[14, 17], threshold="99%")
    assert alone.thresholds is not None and not torch.equal(alone.thresholds, found.thresholds)
    with pytest.raises(BadInput, match="no threshold was given"):
        tl.activations(model, scenes.images[:2], "layer4", over=scenes)
    with pytest.raises(BadInput, match=r'is a quantile, as "99\.5%"; got 0\.5'):
        tl.activations(model, scenes.images[:2], "layer4", threshold=0.5, over=scenes)


def test_a_quantile_of_zero_and_a_threshold_nothing_reaches(scenes: Any) -> None:
    lowest = tl.activations("demo", scenes.images, "conv1", channels=3, threshold="0%")
    assert lowest.thresholds is not None and lowest.thresholds.item() == lowest.maps.min().item()
    never = tl.activations("demo", scenes.images, "conv1", channels=3, threshold=1e9)
    assert never.masks is not None and not never.masks.any()


def test_a_dead_channel_exceeds_nothing() -> None:
    handle, inputs = SPECIMENS["plain"]()
    with torch.no_grad():
        handle.module.conv1.weight[2], handle.module.conv1.bias[2] = 0, -1
    for threshold in (0.0, "99%", "0%"):
        found = tl.activations(handle, inputs, "relu1", channels=2, threshold=threshold)
        assert found.masks is not None and not found.masks.any()


def test_masks_on_tokens() -> None:
    handle, inputs = SPECIMENS["vit_registers"]()
    found = tl.activations(handle, inputs, "blocks.0", channels=[2], threshold="80%")
    assert found.masks is not None and found.masks.shape == (3, 1, 32, 48)
    assert found.thresholds is not None
    assert agree(found.masks, by_loop(found.maps, found.thresholds.tolist(), (32, 48)))


# -- the result -------------------------------------------------------------------------------------------------------


def test_an_overlay_is_dark_outside_the_mask(scenes: Any) -> None:
    found = tl.activations("demo", scenes.images, "layer4", channels=[17, 14], threshold="95%")
    assert found.masks is not None
    for place, channel in enumerate(found.channels):
        shown, mask = found.overlay(channel), found.masks[:, place, None].expand(-1, 3, -1, -1)
        assert shown.shape == (3, 3, 64, 64)
        assert torch.equal(shown[mask], found.images[mask])
        torch.testing.assert_close(shown[~mask], found.images[~mask] * 0.25)
    with pytest.raises(BadInput, match="channels 17, 14; name one"):
        found.overlay()
    with pytest.raises(BadInput, match="got 3"):
        found.overlay(3)


def test_an_overlay_without_threshold_is_the_map_in_colour(scenes: Any) -> None:
    for layer in ("layer4", "conv1"):  # positive, signed
        found = tl.activations("demo", scenes.images, layer, channels=5)
        shown = found.overlay()
        assert shown.shape == (3, 3, 64, 64) and shown.min() >= 0 and shown.max() <= 1
        assert (shown - found.images.mean(1, keepdim=True)).abs().max() > 0.2
        assert torch.equal(found.overlay(alpha=0)[0], found.images[0].mean(0, keepdim=True).expand(3, -1, -1))


def test_one_image_of_several(scenes: Any) -> None:
    found = tl.activations("demo", scenes.images, "layer4", channels=[3, 4], threshold="90%")
    one = found[-1]
    assert len(one) == 1 and torch.equal(one.maps, found.maps[2:]) and torch.equal(one.images, found.images[2:])
    assert one.masks is not None and found.masks is not None and torch.equal(one.masks, found.masks[2:])
    assert one.threshold == found.threshold
    with pytest.raises(IndexError):
        found[3]


@pytest.mark.parametrize("threshold", [None, 0.5, "99%"])
def test_what_is_saved_comes_back(tmp_path: Path, scenes: Any, threshold: Any) -> None:
    found = tl.activations("demo", scenes.images, "layer4", channels=[3, 4], threshold=threshold)
    again = tl.open(found.save(tmp_path / "one"))
    assert isinstance(again, tl.Activations)
    for name in found.__dataclass_fields__:
        before, after = getattr(found, name), getattr(again, name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after, name
    assert again._repr_png_()


def test_nothing_is_left_behind() -> None:
    handle, inputs = SPECIMENS["inplace"]()
    handle.module.train()
    before = Snapshot(handle.module, inputs)
    tl.activations(handle, inputs, "conv2", threshold="50%")
    with pytest.raises(BadInput):
        tl.activations(handle, inputs, "conv2", channels=99)
    assert before.differences() == []


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda m, x: tl.activations(m, x, "layer9"), UnknownName, "did you mean"),
        (lambda m, x: tl.activations(m, x, "layer4", channels=[128]), BadInput, "channels 0 to 127; got 128"),
        (lambda m, x: tl.activations(m, x, "layer4", channels=[]), BadInput, "no channels"),
        (lambda m, x: tl.activations(m, x, "layer4", threshold="0.5"), BadInput, "as \"99%\"; got '0.5'"),
        (lambda m, x: tl.activations(m, x, "layer4", threshold="high%"), BadInput, "got 'high%'"),
        (lambda m, x: tl.activations(m, x, "layer4", threshold="100%"), BadInput, 'below "100%"'),
        (lambda m, x: tl.activations(m, x, "layer4", threshold="-1%"), BadInput, "got '-1%'"),
        (lambda m, x: tl.activations(m, x, "layer4", threshold=float("nan")), BadInput, "finite"),
        (lambda m, x: tl.activations(m, x, "layer4", threshold=True), BadInput, "finite number; got True"),
        (lambda m, x: tl.activations(m, x, "layer4", threshold=object()), BadInput, "threshold is a value"),
        (lambda m, x: tl.activations(m, x, "layer4", threshold=[1, 2, 3]), BadInput, r"one value or 128.*got \[3\]"),
        (
            lambda m, x: tl.activations(m, x, "layer4", channels=[1, 2], threshold=[1, 2, 3]),
            BadInput,
            r"one value or 2 or 128, one for each channel; got \[3\]",
        ),
        (lambda m, x: tl.activations(m, x, "fc", threshold=0.5), NotApplicable, "one position"),
        (lambda m, x: tl.activations(m, x, "layer4", batch_size=0), BadInput, "at least 1"),
        (lambda m, x: tl.activations(m, [], "layer4"), BadInput, "no images"),
        (lambda m, x: tl.activations(m, x * float("nan"), "layer4"), BadInput, "NaN"),
        (lambda m, x: tl.activations(m, x, "layer4").plot(scale="own"), BadInput, "got 'own'"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(
    ask: Callable[[tl.Handle, Tensor], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ask(tl.load("demo"), torch.rand(1, 3, 64, 64))


def test_layers_without_a_map_and_infinite_maps_are_refused() -> None:
    handle, inputs = SPECIMENS["vit_registers"]()
    with pytest.raises(NotApplicable, match=r"gives no map of channels"):
        tl.activations(handle, inputs, "blocks.0.attn.q_norm")
    handle, inputs = SPECIMENS["plain"]()
    with torch.no_grad():
        handle.module.conv1.weight.fill_(float("inf"))
    with pytest.raises(BadInput, match="gives NaN or infinity"):
        tl.activations(handle, inputs, "conv1")


def test_pictures_of_different_sizes_become_one_batch() -> None:
    pictures = [Image.new("RGB", size, "red") for size in ((40, 30), (90, 64))]
    assert tl.activations("demo", pictures, "layer2").maps.shape == (2, 64, 16, 16)
