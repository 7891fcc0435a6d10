"""`tl.examples`: rankings against keeping every activation and sorting, patches against cutting them by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, BadTarget, NotApplicable, UnknownName
from torchloupe_core.layout import to_map
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.statistics import _ranks

IMAGES = 13
LAYERS = {
    "plain": ["conv1", "conv2"],
    "residual": ["layer1", "layer2"],
    "concat": ["norm"],
    "depthwise": ["depthwise"],
    "nhwc": ["window_block"],
    "vit_registers": ["blocks.0", "blocks.1"],
    "grayscale": ["conv1"],
}


def noise(handle: Any, n: int = IMAGES) -> Tensor:
    return torch.randn(n, *handle.spec.input_size, generator=torch.Generator().manual_seed(1))


def every_map(handle: Any, inputs: Tensor, layer: str) -> Tensor:
    """All activations of a layer, one image at a time."""
    with handle.watch(layer) as watch:
        maps = []
        for image in inputs:
            watch(image[None])
            maps.append(to_map(watch[layer], handle.layer(layer).layout))
    return torch.cat(maps)


def ranked(scores: Tensor, k: int, *, descending: bool = True) -> Tensor:
    """The first k along the last dimension, equal ones by place."""
    return scores.argsort(dim=-1, descending=descending, stable=True)[..., :k]


def layers_there(name: str) -> list[str]:
    handle, _ = SPECIMENS[name]()
    return [layer for layer in LAYERS[name] if layer in handle.layers and handle.layers[layer].spatial]


def flat(crops: Any) -> list[Any]:
    return [crop for row in crops for crop in row]


# -- rankings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", ["max", "min"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_streamed_answer_is_that_of_keeping_everything(name: str, band: str) -> None:
    handle, _ = SPECIMENS[name]()
    inputs, layers = noise(handle), layers_there(name)
    assert layers
    found = tl.examples(handle, inputs, layers, k=4, band=band, batch_size=5)  # type: ignore[arg-type]
    row = 0
    for layer in layers:
        maps = every_map(handle, inputs, layer)
        width = maps.shape[3]
        flat = maps.transpose(0, 1).flatten(2)  # [C, N, h * w]
        best = flat.max(2) if band == "max" else flat.min(2)
        chosen = ranked(best.values, 4, descending=band == "max")
        rows = slice(row, row + len(flat))
        assert found.units[rows] == tuple(f"{layer}:{channel}" for channel in range(len(flat)))
        assert torch.equal(found.indices[rows], chosen)
        torch.testing.assert_close(found.scores[rows], best.values.gather(1, chosen))
        at = best.indices.gather(1, chosen)
        assert torch.equal(found.positions[rows], torch.stack([at // width, at % width], -1))
        row += len(flat)
    assert len(found) == row and found.forwards == found.images == IMAGES


def test_units_of_every_kind_in_one_pass() -> None:
    handle, _ = SPECIMENS["residual"]()
    inputs = noise(handle)
    layer = layers_there("residual")[-1]
    other = layers_there("residual")[0]
    count = handle.layers[layer].channels or 0
    vector = "[" + ",".join(str(0.5 - n % 3) for n in range(count)) + "]"
    targets: list[Any] = [
        "logit:1",
        f"{layer}:3",
        f"-{layer}:2",
        f"{layer}:{vector}",
        f"{layer}:{vector}^2",
        f"{layer}:1@0,2",
        f"{layer}:1@center",
        f"0.5*{layer}:1-2*{layer}:4",
        f"{layer}:3+{other}:2",
        f"{layer}:3-0.5*prob:0",
        tl.margin(0),
        2,
        f"{layer}:1@0,2+{layer}:3@1,1",
        f"{layer}:1+{layer}",
    ]
    found = tl.examples(handle, inputs, targets, k=5, batch_size=4)
    assert found.forwards == IMAGES
    assert found.units == tuple(str(tl.logit(one) if isinstance(one, int) else tl.target(str(one))) for one in targets)
    for row, target in enumerate(targets):
        scores = handle.score(inputs, target, reduce="max")
        assert torch.equal(found.indices[row], ranked(scores, 5)), target
        torch.testing.assert_close(found.scores[row], scores[found.indices[row]])
    maps = every_map(handle, inputs, layer)
    grid = maps.shape[2:]
    both = 0.5 * maps[:, 1] - 2 * maps[:, 4]
    for place, index in enumerate(found.indices[7].tolist()):  # a sum within a layer has a position
        row, column = found.positions[7, place].tolist()
        assert both[index, row, column] == both[index].max()
    assert found.positions[5].tolist() == [[0, 2]] * 5
    assert found.positions[6].tolist() == [[grid[0] // 2, grid[1] // 2]] * 5
    for row in (0, 8, 9, 10, 11, 12, 13):  # outputs, sums over layers and over several places have none
        assert (found.positions[row] == -1).all() and found.points[row].isnan().all()
        assert (found.boxes[row] == torch.tensor([0, 0, 32, 32])).all()


def test_a_whole_layer_may_be_negated_and_stand_beside_its_channels() -> None:
    handle, _ = SPECIMENS["plain"]()
    inputs = noise(handle)
    found = tl.examples(handle, inputs, ["-conv1", "conv1:2", "conv1"], k=3)
    count = handle.layers["conv1"].channels or 0
    assert found.units[:2] == ("-conv1:0", "-conv1:1") and len(found) == 2 * count + 1
    lowest = tl.examples(handle, inputs, "conv1", k=3, band="min")
    torch.testing.assert_close(found.scores[:count], -lowest.scores)
    assert torch.equal(found.indices[count], found.indices[count + 1 + 2])


def test_several_patches_of_one_image() -> None:
    handle, _ = SPECIMENS["plain"]()
    inputs = noise(handle)
    maps = every_map(handle, inputs, "conv2")
    width = maps.shape[3]
    for band in ("max", "min"):
        found = tl.examples(handle, inputs, "conv2", k=7, per_image=3, band=band)  # type: ignore[arg-type]
        flat = maps.transpose(0, 1).flatten(2)
        top = ranked(flat, 3, descending=band == "max")  # [C, N, 3]
        values = flat.gather(2, top).flatten(1)
        order = ranked(values, 7, descending=band == "max")
        torch.testing.assert_close(found.scores, values.gather(1, order))
        assert torch.equal(found.indices, order // 3)
        assert torch.equal(found.positions[..., 0] * width + found.positions[..., 1], top.flatten(1).gather(1, order))
        assert max(found.indices.flatten(0, 0)[0].bincount().tolist()) <= 3


def test_images_rank_by_their_largest_value() -> None:
    handle, _ = SPECIMENS["plain"]()
    inputs = noise(handle)
    scores = every_map(handle, inputs, "conv2").amax((2, 3)).T
    warm = tl.examples(handle, inputs, "conv2", k=4, crop="image")
    cold = tl.examples(handle, inputs, "conv2", k=4, crop="image", band="min")
    assert torch.equal(warm.indices, ranked(scores, 4)) and torch.equal(
        cold.indices, ranked(scores, 4, descending=False)
    )
    torch.testing.assert_close(cold.scores, scores.gather(1, cold.indices))
    assert all(crop.shape == (3, 32, 32) for row in cold.crops for crop in row if crop is not None)


@pytest.mark.parametrize("crop", ["patch", "image"])
def test_the_middle_is_around_the_median(crop: Any) -> None:
    handle, _ = SPECIMENS["plain"]()
    inputs = noise(handle)
    maps = every_map(handle, inputs, "conv2")
    found = tl.examples(handle, inputs, "conv2", k=3, band="middle", crop=crop, seed=5)
    flat = maps.flatten(2)
    if crop == "patch":
        drawn = _ranks(torch.arange(IMAGES), 6) % flat.shape[2]
        scores = flat[torch.arange(IMAGES), :, drawn].T  # [C, N]
        at = found.positions[..., 0] * maps.shape[3] + found.positions[..., 1]
        assert torch.equal(at, drawn[found.indices])
    else:
        scores = flat.amax(2).T
    median = scores.double().median(1, keepdim=True).values
    nearest = ranked((scores.double() - median).abs(), 3, descending=False)
    assert torch.equal(found.indices.sort(1).values, nearest.sort(1).values)
    assert (found.scores.diff(dim=1) <= 0).all()
    torch.testing.assert_close(found.scores, scores.gather(1, found.indices))


def test_a_spectrum_goes_from_the_smallest_to_the_largest() -> None:
    handle, _ = SPECIMENS["plain"]()
    inputs = noise(handle, 60)
    found = tl.examples(handle, inputs, ["conv1", "logit:1"], k=9, band="spectrum")
    assert found.bands == (
        *("minimum",) * 2,
        *("slightly negative",) * 2,
        "median",
        *("slightly positive",) * 2,
        *("maximum",) * 2,
    )
    assert (found.scores.diff(dim=1) >= 0).all()
    low = tl.examples(handle, inputs, ["conv1", "logit:1"], k=2, band="min")
    high = tl.examples(handle, inputs, ["conv1", "logit:1"], k=2)
    assert torch.equal(found.indices[:, :2], low.indices) and torch.equal(found.indices[:, 7:].flip(1), high.indices)
    scores = handle.score(inputs, "logit:1").double().sort().values
    below, above = ((scores < 0).double().mean(), (scores > 0).double().mean())
    shares = [0.75 * min(below or 0.5, 0.5), 0.5, 1 - 0.75 * min(above or 0.5, 0.5)]
    for share, columns in zip(shares, ([2, 3], [4], [5, 6]), strict=True):
        middle = scores[round(float(share) * 59)]
        nearest = (scores - middle).abs().sort().values[: len(columns)]
        torch.testing.assert_close((found.scores[-1, columns].double() - middle).abs().sort().values, nearest)


def test_slightly_is_on_its_own_side_of_zero() -> None:
    values = torch.cat([torch.linspace(-1, -0.1, 30), torch.linspace(0.1, 4, 10)]).view(40, 1, 1, 1)
    handle = tl.wrap(Sum(), input_size=(1, 1, 1))
    found = tl.examples(handle, values, "out:0", k=5, band="spectrum", crop="image")
    low, slightly_low, median, slightly_high, high = found.scores[0].tolist()
    assert (low, high) == (-1.0, 4.0) and slightly_low < median < 0 < slightly_high < 2
    positive = tl.examples(handle, values + 5, "out:0", k=5, band="spectrum", crop="image").scores[0].tolist()
    assert positive == sorted(positive) and len(set(positive)) == 5


class Sum(nn.Module):
    """One unit, which is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).flatten(1)


# -- patches ----------------------------------------------------------------------------------------------------------


def test_patches_are_the_exact_receptive_fields() -> None:
    model, scenes = tl.load("demo"), tl.demo_scenes(40, seed=2)
    found = tl.examples(model, scenes, ["layer2", "layer3:5"], k=6)
    pictures = scenes.images.float() / 255
    for row in (0, 7, len(found) - 1):
        layer, _, channel = found.units[row].partition(":")
        field = tl.receptive_field(model, layer, int(channel))
        for place, index in enumerate(found.indices[row].tolist()):
            box, cut = field.clipped(*found.positions[row, place].tolist())
            assert tuple(found.boxes[row, place].tolist()) == box
            assert tuple(found.outside[row, place].tolist()) == cut
            top, left, bottom, right = box
            crop = found.crops[row][place]
            assert crop is not None
            torch.testing.assert_close(crop, pictures[index, :, top:bottom, left:right], atol=1e-6, rtol=0)
            whole = tuple(size + sum(cut[axis::2]) for axis, size in enumerate(crop.shape[1:]))
            assert whole == (field.size, field.size)
    assert (found.outside > 0).any() and (found.outside.flatten(0, 1) == 0).all(1).any()  # some at borders, some not
    assert found.labels.tolist() == [[int(scenes.labels[i]) for i in row] for row in found.indices.tolist()]


def test_the_patch_alone_gives_the_score() -> None:
    """What lies outside the box is not read: the unit has the same value when it is blanked."""
    model, scenes = tl.load("demo"), tl.demo_scenes(30, seed=4)
    found = tl.examples(model, scenes, ["layer3:5", "layer2:9", "layer1:3"], k=3)
    inputs = model.inputs(scenes.images)
    for row in range(3):
        layer, _, channel = found.units[row].partition(":")
        for place, index in enumerate(found.indices[row].tolist()):
            top, left, bottom, right = found.boxes[row, place].tolist()
            at = tuple(found.positions[row, place].tolist())
            blank = torch.full_like(inputs[index : index + 1], 3.0)
            blank[:, :, top:bottom, left:right] = inputs[index, :, top:bottom, left:right]
            value = every_map(model, blank, layer)[0, int(channel), at[0], at[1]]
            torch.testing.assert_close(value, found.scores[row, place], rtol=1e-4, atol=1e-4)


def test_channels_of_a_concatenation_have_their_own_fields() -> None:
    handle, _ = SPECIMENS["concat"]()
    (layer,) = layers_there("concat")
    inputs = noise(handle)
    found = tl.examples(handle, inputs, layer, k=4)
    count = len(found)
    for row in range(count):
        field = tl.receptive_field(handle, layer, row)
        for place in range(4):
            assert tuple(found.boxes[row, place].tolist()) == field.clipped(*found.positions[row, place].tolist()).box
    sizes = {tl.receptive_field(handle, layer, row).size for row in range(count)}
    assert len(sizes) > 1
    mixed = tl.examples(handle, inputs, [f"{layer}:0+{layer}:{count - 1}", f"{layer}:[{','.join('1' * count)}]"], k=4)
    for row, channels in enumerate(([0, count - 1], range(count))):  # the box around the fields of those it reads
        for place in range(4):
            at = mixed.positions[row, place].tolist()
            boxes = torch.tensor([tl.receptive_field(handle, layer, c).clipped(*at).box for c in channels])
            assert mixed.boxes[row, place].tolist() == [*boxes[:, :2].amin(0).tolist(), *boxes[:, 2:].amax(0).tolist()]


def test_without_gates_a_token_has_its_patch() -> None:
    handle, _ = SPECIMENS["vit_registers"]()
    inputs = noise(handle)
    whole = tl.examples(handle, inputs, "blocks.1:3", k=3)
    local = tl.examples(handle, inputs, "blocks.1:3", k=3, without_gates=True)
    assert whole.boxes.tolist() == [[[0, 0, 32, 48]] * 3]
    for box, (row, column) in zip(local.boxes[0].tolist(), local.positions[0].tolist(), strict=True):
        assert box == [8 * row, 8 * column, 8 * row + 8, 8 * column + 8]
    middles = (whole.positions[0] + 0.5) * 8
    assert torch.equal(whole.points[0], middles) and torch.equal(local.points[0], middles)


def test_images_of_different_sizes() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU()).eval()
    handle = tl.wrap(module)
    images = [
        torch.randn(3, size, size + 6, generator=torch.Generator().manual_seed(size)) for size in range(12, 32, 2)
    ]
    found = tl.examples(handle, images, "0", k=3, batch_size=4)
    with torch.no_grad():
        maps = [module[0](image[None])[0] for image in images]
    for channel in range(4):
        best = torch.stack([one[channel].max() for one in maps])
        assert torch.equal(found.indices[channel], ranked(best, 3))
        for place, index in enumerate(found.indices[channel].tolist()):
            row, column = found.positions[channel, place].tolist()
            assert maps[index][channel, row, column] == best[index]
            assert found.sizes[channel, place].tolist() == list(images[index].shape[1:])
            top, left = max(0, 2 * row - 1), max(0, 2 * column - 1)
            assert found.boxes[channel, place].tolist()[:2] == [top, left]
            crop = found.crops[channel][place]
            assert crop is not None and crop.shape == (3, min(2 * row + 2, images[index].shape[1]) - top, crop.shape[2])


# -- data sets --------------------------------------------------------------------------------------------------------


class Opened(Dataset[Any]):
    """Says which items were asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.opened = images, []  # type: Tensor, list[int]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.opened.append(index)
        return self.images[index], index % 3


class Stream(IterableDataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images)


def test_only_winning_images_are_opened_again_and_once() -> None:
    handle, _ = SPECIMENS["plain"]()
    data = Opened(noise(handle))
    found = tl.examples(handle, data, ["conv1:0", "conv1:1"], k=2)
    assert data.opened == list(range(IMAGES))
    data.opened.clear()
    assert found.crops is found.crops
    assert data.opened == sorted(set(found.indices.flatten().tolist()))
    assert torch.equal(found.labels, found.indices % 3)
    data.opened.clear()
    _ = found[1].crops
    assert data.opened == sorted(set(found.indices[1].tolist()))


def test_every_kind_of_data_set_gives_the_same() -> None:
    handle, _ = SPECIMENS["plain"]()
    inputs = noise(handle)
    expected = tl.examples(handle, inputs, "conv2", k=3)
    kinds = [
        list(inputs),
        TensorDataset(inputs),
        DataLoader(TensorDataset(inputs), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(inputs), batch_size=3, num_workers=1),
        Stream(inputs),
    ]
    for data in kinds:
        found = tl.examples(handle, data, "conv2", k=3)
        assert torch.equal(found.indices, expected.indices)
        for one, other in zip(flat(found.crops), flat(expected.crops), strict=True):
            torch.testing.assert_close(one, other)


def test_a_folder_with_classes_and_a_corrupt_picture(tmp_path: Path) -> None:
    model, scenes = tl.load("demo"), tl.demo_scenes(6, seed=1)
    for index, image in enumerate(scenes.images):
        folder = tmp_path / ("cats" if index % 2 else "ants")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    (tmp_path / "ants" / "bad.png").write_bytes(b"no picture")
    found = tl.examples(model, tmp_path, "layer3:5", k=9)
    assert found.images == 6 and found.indices.shape == (1, 6)  # fewer images than k: fewer columns
    assert list(found.skipped) == [str(tmp_path / "ants" / "bad.png")] and "not an image" in next(
        iter(found.skipped.values())
    )
    assert found.classes == ("ants", "cats")
    for index, label in zip(found.indices[0].tolist(), found.labels[0].tolist(), strict=True):
        assert Path(found.name(index)).parent.name == found.classes[label]
    with pytest.raises(BadInput, match=r"bad\.png is not an image"):
        tl.examples(model, tmp_path, "layer3:5", skip_failures=False)
    Path(found.name(int(found.indices[0, 0]))).unlink()
    with pytest.raises(BadInput, match="was read before and cannot be now"):
        _ = found.crops


def test_saved_and_opened_again(tmp_path: Path) -> None:
    model, scenes = tl.load("demo"), tl.demo_scenes(20)
    found = tl.examples(model, scenes, ["layer3:5", "logit:fish"], k=4)
    again = tl.open(found.save(tmp_path / "all"))
    assert isinstance(again, tl.Examples) and again.data is None
    for name in ("scores", "indices", "positions", "boxes", "outside", "sizes", "labels"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert torch.equal(again.points.isnan(), found.points.isnan()) and again.units == found.units
    for result in (again, again[1], tl.open(again.save(tmp_path / "twice"))):
        rows = found.crops if len(result) == 2 else found.crops[1:]  # type: ignore[arg-type]
        for one, other in zip(flat(result.crops), flat(rows), strict=True):
            torch.testing.assert_close(one, other, atol=0.5 / 255 + 1e-6, rtol=0)
    bare = tl.open(found.save(tmp_path / "bare", crops=False))
    assert isinstance(bare, tl.Examples) and torch.equal(bare.scores, found.scores)
    with pytest.raises(BadInput, match="saved without its crops"):
        _ = bare.crops
    assert again.figure().axes and (tmp_path / "bare.npz").stat().st_size < (tmp_path / "all.npz").stat().st_size / 2


# -- no trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "concat", "vit_registers"])
def test_nothing_is_left_behind(name: str) -> None:
    handle, _ = SPECIMENS[name]()
    inputs = noise(handle)
    handle.module.train()
    before = Snapshot(handle.module, inputs)
    layer = layers_there(name)[0]
    tl.examples(handle, inputs, [layer, "logit:1"], k=2, band="middle")
    with pytest.raises(BadTarget):
        tl.examples(handle, inputs, f"{layer}:999")
    bad = inputs.clone()
    bad[3] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        tl.examples(handle, list(bad), layer, skip_failures=False)
    assert before.differences() == []


def test_the_batch_size_makes_no_difference() -> None:
    handle, _ = SPECIMENS["concat"]()
    inputs = noise(handle)
    (layer,) = layers_there("concat")
    one, other = (tl.examples(handle, inputs, [layer, "prob:1"], k=3, batch_size=size) for size in (1, 6))
    assert torch.equal(one.indices, other.indices) and torch.equal(one.positions, other.positions)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is at least 1 here; got 0"),
        ({"k": 4, "band": "spectrum"}, "k is at least 5 here; got 4"),
        ({"band": "best"}, 'band is "max", "min", "middle" or "spectrum"; got \'best\''),
        ({"crop": "box"}, 'crop is "patch" or "image"; got \'box\''),
        ({"per_image": 0}, "per_image is at least 1; got 0"),
        ({"per_image": 2, "crop": "image"}, 'per_image above 1 needs crop="patch"'),
        ({"per_image": 2, "band": "middle"}, 'per_image above 1 needs crop="patch"'),
        ({"batch_size": 0}, "batch_size is at least 1; got 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    handle, _ = SPECIMENS["plain"]()
    with pytest.raises(BadInput) as caught:
        tl.examples(handle, noise(handle), "conv1:0", **options)
    assert message in str(caught.value)
    assert handle.forwards == 0


def test_bad_targets_and_data(tmp_path: Path) -> None:
    handle, _ = SPECIMENS["plain"]()
    inputs = noise(handle)
    single = next(name for name, layer in handle.layers.items() if layer.layout and not layer.spatial)
    with pytest.raises(NotApplicable, match=r'has one position, so there is no patch to cut; crop="image" shows'):
        tl.examples(handle, inputs, single)
    assert tl.examples(handle, inputs, single, crop="image", k=2).boxes[0, 0].tolist() == [0, 0, 32, 32]
    with pytest.raises(BadTarget, match="has channels 0 to"):
        tl.examples(handle, inputs, "conv1:99")
    with pytest.raises(UnknownName, match="conv2"):
        tl.examples(handle, inputs, "conv22:0")
    with pytest.raises(BadInput, match="no target was given"):
        tl.examples(handle, inputs, [])
    with pytest.raises(BadInput, match="the data set is empty"):
        tl.examples(handle, [], "conv1:0")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"none of the 2 images could be read; the first: .*a\.png is not an image"):
        tl.examples(handle, tmp_path, "conv1:0")


def test_outputs_that_are_not_finite_name_the_image() -> None:
    module = Sum()
    with torch.no_grad():
        module.out.weight.fill_(1e30)
    inputs = torch.ones(6, 1, 1, 1)
    inputs[4] = 1e20
    with pytest.raises(BadInput, match="a target holds NaN or infinity for image 4"):
        tl.examples(tl.wrap(module, input_size=(1, 1, 1)), inputs, "logit:0")


def test_a_first_image_that_cannot_be_read_does_not_matter() -> None:
    torch.manual_seed(0)
    handle = tl.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))  # whose input size is not known
    bad, good = torch.full((3, 12, 12), torch.nan), torch.randn(3, 12, 12)
    found = tl.examples(handle, [bad, good], "0:1", k=1)
    assert found.indices.tolist() == [[1]] and list(found.skipped) == ["image 0"]
    with pytest.raises(BadInput, match="no image of the data set can be read"):
        tl.examples(handle, [bad], "0:1", k=1)


def test_more_asked_for_than_there_is() -> None:
    handle, _ = SPECIMENS["plain"]()
    for band, columns in (("max", 3), ("min", 3), ("middle", 3), ("spectrum", 15)):
        found = tl.examples(handle, noise(handle, 3), ["conv1:0", "logit:1"], k=40, band=band)  # type: ignore[arg-type]
        assert found.indices.shape == (2, columns) and (found.indices >= 0).all()
        bands = ("minimum", "slightly negative", "median", "slightly positive", "maximum")
        assert found.bands == (tuple(name for name in bands for _ in range(3)) if band == "spectrum" else ())
        assert np.isfinite(found.scores.numpy()).all()
