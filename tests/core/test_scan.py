"""One pass over a data set: the streamed answer is the one of a plain loop that keeps everything."""

from __future__ import annotations

import multiprocessing
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.dataset import DataSet, open_data
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.layout import to_map
from torchloupe_core.scan import Scanned, scan
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.statistics import Features, Histogram, Moments, Quantiles, Sampled, Top
from torchloupe_core.watch import Place


def images(handle: Handle, n: int = 21, seed: int = 1) -> Tensor:
    """Model inputs; some are alike, so that there are ties between images."""
    assert handle.spec.input_size is not None
    inputs = torch.randn(n, *handle.spec.input_size, generator=torch.Generator().manual_seed(seed))
    inputs[n // 2] = inputs[1]
    inputs[-1] = inputs[0]
    return inputs


def plainly(handle: Handle, layer: str, inputs: Tensor) -> Tensor:
    """A layer's maps `[N, C, h, w]` of all images, seen by an ordinary hook, one image at a time."""
    place, seen = Place.parse(layer), []  # type: Place, list[Tensor]
    part = handle.module.get_submodule(place.module)
    if place.entering:
        hook = part.register_forward_pre_hook(lambda part, given: seen.append(given[0].clone()))
    else:
        hook = part.register_forward_hook(lambda part, given, output: seen.append(output.clone()))
    layout, maps = handle.layer(layer).layout, []
    assert layout is not None
    with torch.no_grad():
        for image in inputs:
            seen.clear()
            handle.module(image[None].clone())
            maps.append(to_map(seen[place.call - 1 if place.call else -1], layout))
    hook.remove()
    return torch.cat(maps)


def plain_top(maps: Tensor, k: int, *, largest: bool = True, per_image: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Every activation kept, then sorted: first within each image, then over all images."""
    flat = maps.flatten(2) if largest else -maps.flatten(2)
    values, places = flat.sort(dim=2, descending=True, stable=True)
    values, places = (one[:, :, :per_image].transpose(0, 1).flatten(1) for one in (values, places))
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    scores = values.gather(1, order)
    indices = order // min(per_image, flat.shape[2])
    return scores if largest else -scores, indices, places.gather(1, order)


def scanned(handle: Handle, data: Any, statistics: Mapping[str, Sequence[Any]], **options: Any) -> Scanned:
    return scan(handle, open_data(data, handle.spec), statistics, **options)


LAYERS = {
    "plain": ["conv1", "relu1", "pool", "relu2", "fc.in", "fc"],
    "residual": ["relu", "layer1.relu#1", "layer1.relu", "layer2", "fc.in"],
    "concat": ["stem", "narrow", "norm.in", "norm"],
    "inplace": ["bn1", "relu#1", "relu#2", "relu", "conv2", "fc"],
    "nhwc": ["conv_block", "conv_block.fc1", "window_block", "window_block.fc2", "head.in"],
    "vit_registers": ["patches", "blocks.0", "blocks.2.norm1", "blocks.1.mlp"],
    "grayscale": ["relu1", "relu2"],
}


# -- the plain answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("specimen", LAYERS)
def test_one_pass_gives_what_keeping_everything_gives(specimen: str) -> None:
    """One image at a time, so that every activation is the same to the last bit."""
    handle, _ = SPECIMENS[specimen]()
    inputs, layers = images(handle), LAYERS[specimen]
    dead = next(part for part in handle.module.modules() if isinstance(part, nn.Conv2d))
    with torch.no_grad():
        dead.weight[0], dead.weight[1] = 0, 0
        assert dead.bias is None or dead.bias[:2].fill_(-1).all()
    asked = {layer: [Top(5), Top(4, largest=False), Top(9, per_image=3), Top(30), Features()] for layer in layers}
    found = scanned(handle, inputs, asked, batch_size=1)
    assert found.images == len(inputs)
    for layer in layers:
        maps = plainly(handle, layer, inputs)
        best, least, several, all_of_them, features = (one.compute() for one in asked[layer])
        for extremes, expected in (
            (best, plain_top(maps, 5)),
            (least, plain_top(maps, 4, largest=False)),
            (several, plain_top(maps, 9, per_image=3)),
        ):
            assert torch.equal(extremes.scores, expected[0]), layer
            assert torch.equal(extremes.indices, expected[1]), layer
            assert torch.equal(extremes.positions, expected[2]), layer
        assert all_of_them.indices[:, 21:].eq(-1).all()
        assert all_of_them.found.sum(1).eq(21).all()
        assert torch.equal(all_of_them.indices[:, :21], plain_top(maps, 21)[1])
        assert torch.equal(features[0], torch.arange(21))
        torch.testing.assert_close(features[1], maps.mean((2, 3)))


class Exact(nn.Module):
    """Whole numbers, so that no batch size rounds otherwise; rectified, so that many are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.deep = nn.Conv2d(6, 4, 3, 2)
        with torch.no_grad():
            for part in (self.conv, self.deep):
                part.weight.copy_(torch.randint(-2, 3, part.weight.shape, generator=torch.Generator().manual_seed(0)))
                assert part.bias is not None
                part.bias.zero_()
            self.conv.weight[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(self.pool(self.relu(self.conv(x)))).amax((2, 3))  # type: ignore[no-any-return]


def exact(n: int = 37, size: tuple[int, int] = (12, 10)) -> tuple[Handle, Tensor]:
    inputs = torch.randint(-2, 3, (n, 3, *size), generator=torch.Generator().manual_seed(2)).float()
    return tl.wrap(Exact().eval(), input_size=(3, *size)), inputs


def tops() -> dict[str, list[Top]]:
    return {
        layer: [Top(7), Top(7, largest=False), Top(11, per_image=4), Top(50, largest=False, per_image=2)]
        for layer in ("conv", "relu", "pool", "deep")
    }


def require_same(found: Mapping[str, Sequence[Any]], expected: Mapping[str, Sequence[Any]]) -> None:
    for layer in expected:
        for one, other in zip(found[layer], expected[layer], strict=True):
            for name, value in vars(other.compute()).items():
                assert torch.equal(getattr(one.compute(), name), value), (layer, name)


@pytest.mark.parametrize("size", [1, 3, 8, 37, 64, None])
def test_the_answer_is_the_same_for_every_batch_size(size: int | None) -> None:
    handle, inputs = exact()
    asked = tops()
    before = handle.forwards
    scanned(handle, inputs, asked, batch_size=size)
    assert handle.forwards - before == 37  # one forward for all of them
    for layer, (best, least, several, _) in asked.items():
        maps = plainly(handle, layer, inputs)
        for one, expected in (
            (best, plain_top(maps, 7)),
            (least, plain_top(maps, 7, largest=False)),
            (several, plain_top(maps, 11, per_image=4)),
        ):
            found = one.compute()
            assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), expected, strict=True))


@pytest.mark.parametrize("interleaved", [True, False])
def test_shards_and_a_pass_taken_up_again_give_the_same(interleaved: bool) -> None:
    handle, inputs = exact()
    whole, merged, resumed = tops(), tops(), tops()
    scanned(handle, inputs, whole, batch_size=8)
    parts = [
        list(range(37))[part::3] if interleaved else list(range(37))[part * 13 : part * 13 + 13] for part in range(3)
    ]
    for order in reversed(parts):
        shard = tops()
        scan(handle, DataSet(inputs, handle.spec, order=order), shard, batch_size=4)
        for layer, mine in merged.items():
            for one, other in zip(mine, shard[layer], strict=True):
                one.merge(other)
    require_same(merged, whole)
    first = tops()
    scan(handle, DataSet(inputs, handle.spec, order=range(20)), first, batch_size=8)
    for layer, mine in resumed.items():
        for one, other in zip(mine, first[layer], strict=True):
            one.load_state_dict({name: np.asarray(value) for name, value in other.state_dict().items()})
    scan(handle, DataSet(inputs, handle.spec, order=range(20, 37)), resumed, batch_size=8)
    require_same(resumed, whole)


def test_a_shuffled_loader_gives_what_the_data_set_gives() -> None:
    handle, inputs = exact()
    whole, shuffled = tops(), tops()
    labels = torch.arange(100, 137)
    scanned(handle, TensorDataset(inputs, labels), whole)
    found = scanned(handle, DataLoader(TensorDataset(inputs, labels), 8, shuffle=True, num_workers=2), shuffled)
    require_same(shuffled, whole)
    assert found.labels == {index: 100 + index for index in range(37)}
    assert multiprocessing.active_children() == []


class Stream(IterableDataset[Tensor]):
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.inputs)


@pytest.mark.parametrize("size", [None, 8, 37])
def test_a_stream_gives_what_the_data_set_gives(size: int | None) -> None:
    handle, inputs = exact()
    whole, streamed, told = tops(), tops(), []  # type: Any, Any, list[tuple[int, int]]
    scanned(handle, inputs, whole)
    found = scanned(handle, Stream(inputs), streamed, batch_size=size, progress=lambda *done: told.append(done))
    require_same(streamed, whole)
    assert found.images == 37
    assert told[-1] == (37, 37)
    assert all(done == total for done, total in told)


def test_images_of_several_sizes_are_sent_by_size() -> None:
    handle, _ = exact()
    sizes = [(12, 10), (16, 14)]
    inputs = [exact(1, sizes[index % 2])[1][0] + index % 3 for index in range(22)]
    asked = tops()
    before = handle.forwards
    found = scanned(handle, inputs, asked, batch_size=6)
    assert (found.images, handle.forwards - before) == (22, 22)
    for layer in asked:
        maps = [plainly_at(handle, layer, one).flatten(2) for one in inputs]
        widest = max(one.shape[2] for one in maps)
        padded = torch.cat([nn.functional.pad(one, (0, widest - one.shape[2]), value=-torch.inf) for one in maps])
        expected = plain_top(padded[..., None], 7)
        assert all(torch.equal(a, b) for a, b in zip(vars(asked[layer][0].compute()).values(), expected, strict=True))


def plainly_at(handle: Handle, layer: str, image: Tensor) -> Tensor:
    with handle.watch(layer, shape=tuple(image.shape)) as watch:  # type: ignore[arg-type]
        watch(image[None])
        return watch.map(layer).clone()


def test_every_statistic_sees_the_map_before_the_model_writes_into_it() -> None:
    handle, _ = SPECIMENS["inplace"]()
    inputs = images(handle)
    maps = plainly(handle, "bn1", inputs)  # a ReLU in place follows
    assert (maps < 0).any()
    for size in (1, 8):
        top, quantiles, moments, histogram, sampled = (
            Top(3, largest=False),
            Quantiles(),
            Moments(),
            Histogram(),
            Sampled(5),
        )
        scanned(handle, inputs, {"bn1": [top, quantiles, moments, histogram, sampled]}, batch_size=size)
        least = maps.transpose(0, 1).flatten(1).amin(1)
        torch.testing.assert_close(top.compute().scores[:, 0], least)
        assert (quantiles.compute().quantile(0) < 0).all()
        torch.testing.assert_close(moments.compute()[0], maps.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        counts, edges = histogram.compute()
        assert torch.equal(counts[:, edges[:-1] < 0].sum(1), (maps < 0).sum((0, 2, 3)))
        indices, scores, _ = sampled.compute()
        torch.testing.assert_close(scores, maps[indices].amax((2, 3)))


# -- cost -------------------------------------------------------------------------------------------------------------


def test_the_pass_stops_after_the_last_layer_asked_for() -> None:
    handle, inputs = exact()
    handle.trace()
    calls: dict[str, int] = {}
    for name, part in handle.module.named_children():
        part.register_forward_pre_hook(lambda part, given, name=name: calls.update({name: calls.get(name, 0) + 1}))
    scanned(handle, inputs, {"relu": [Top(3)], "conv": [Top(3)]}, batch_size=10)
    assert calls == {"conv": 4, "relu": 4}


def test_no_map_is_kept() -> None:
    handle, inputs = exact()
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Looks(Top):
        def look(self, maps: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
            alive.append(sum(one() is not None for one in seen))
            seen.append(weakref.ref(maps))
            return super().look(maps, indices)

    scanned(handle, inputs, {layer: [Looks(3)] for layer in ("conv", "relu", "pool", "deep")}, batch_size=5)
    assert len(seen) == 4 * 8
    assert max(alive) <= 1  # the one before, which the model itself still reads
    assert not any(one() is not None for one in seen)


class Heavy(nn.Module):
    """A last layer that takes no more than `most` images at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.conv, self.after, self.most = nn.Conv2d(3, 4, 1), nn.Identity(), most
        self.sizes: deque[int] = deque()  # a list would be put back as it was

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.after(x).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [["conv", "after"], ["conv", "after", "after.in"]])
@pytest.mark.parametrize("size", [None, 8, 9])
def test_where_memory_ends_the_batch_is_halved_and_no_image_counts_twice(size: int | None, layers: list[str]) -> None:
    module, inputs = Heavy(3), torch.randn(40, 3, 8, 8)
    handle = tl.wrap(module, input_size=(3, 8, 8))
    asked: dict[str, list[Any]] = {layer: [Moments(), Features(), Histogram(), Top(50)] for layer in layers}
    data = [*inputs[:7], "no such file", *inputs[7:]]
    told: list[int] = []
    found = scanned(handle, data, asked, batch_size=size, progress=lambda done, total: told.append(done))
    assert (found.images, list(found.skipped)) == (40, [7])
    assert told == sorted(set(told)) and told[-1] == 41
    assert max(module.sizes) > 3 and module.sizes[-1] <= 3
    with torch.no_grad():
        maps = module.conv(inputs)
    for moments, features, histogram, top in asked.values():
        assert moments.count == 40 * 64
        torch.testing.assert_close(moments.compute()[0].float(), maps.mean((0, 2, 3)))
        assert features.compute()[0].tolist() == [index for index in range(41) if index != 7]
        assert histogram.compute()[0].sum(1).tolist() == [40 * 64] * 4
        assert top.compute().found.sum(1).tolist() == [40] * 4


def test_memory_that_ends_for_one_image_ends_the_scan() -> None:
    handle = tl.wrap(Heavy(3), input_size=(3, 8, 8))
    handle.trace()
    handle.module.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        scanned(handle, torch.randn(9, 3, 8, 8), {"after": [Top(1)]})


def test_memory_that_ends_while_a_statistic_takes_in_is_an_error_not_a_second_try() -> None:
    handle, inputs = exact()

    class Fails(Top):
        def update(self, looked: Any, indices: Tensor) -> None:
            raise MemoryError

    moments = Moments()
    with pytest.raises(MemoryError):
        scanned(handle, inputs, {"conv": [moments, Fails(1)]}, batch_size=8)
    assert moments.count == 8 * 120


def test_memory_that_ends_while_reading_does_not_end_the_data_set_early() -> None:
    handle, inputs = exact()

    class Fails(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if index == 30:
                raise MemoryError
            return super().__getitem__(index)

    with pytest.raises(MemoryError):
        scanned(handle, Fails(inputs), {"conv": [Top(1)]}, batch_size=8)


# -- what cannot be read ----------------------------------------------------------------------------------------------


def spoiled(path: Path, bad: Sequence[int], n: int = 12) -> Path:
    """Pictures of which some are no pictures."""
    for index in range(n):
        file = path / f"{index:02}.png"
        Image.new("RGB", (8, 8), (10 * index, 0, 255 - 10 * index)).save(file)
        if index in bad:
            file.write_bytes(b"no picture")
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 4, None])
def test_files_that_cannot_be_read_are_listed_and_the_rest_is_done(
    tmp_path: Path, size: int | None, workers: int
) -> None:
    bad = [0, 4, 5, 6, 7, 11]
    handle = tl.wrap(Exact().eval(), input_size=(3, 8, 8))
    top, told = Top(12), []  # type: Top, list[tuple[int, int]]
    found = scanned(
        handle,
        spoiled(tmp_path, bad),
        {"conv": [top]},
        batch_size=size,
        workers=workers,
        progress=lambda *done: told.append(done),
    )
    assert found.images == 6
    assert list(found.skipped) == bad
    assert all("is not an image" in why for why in found.skipped.values())
    assert told[-1] == (12, 12)
    assert sorted(top.compute().indices[1].tolist()) == [-1] * 6 + [1, 2, 3, 8, 9, 10]
    assert found.seconds > 0
    with pytest.raises(BadInput, match=r"04\.png is not an image") as caught:
        scan(handle, DataSet(*_named(tmp_path, handle)), {"conv": [Top(1)]}, skip_failures=False, workers=workers)
    assert str(caught.value).count("04.png") == 1
    assert multiprocessing.active_children() == []


def _named(path: Path, handle: Handle) -> tuple[Any, Any]:
    return [str(path / f"{index:02}.png") for index in (1, 2, 4, 5)], handle.spec


def test_inputs_that_hold_nan_are_skipped() -> None:
    handle, inputs = exact(10)
    inputs[3, 0, 0, 0], inputs[8, 2, 1, 1] = torch.nan, torch.inf
    top = Top(1)
    found = scanned(handle, inputs, {"conv": [top]})
    assert found.skipped == {
        3: "the input holds NaN or infinity, in image 3",
        8: "the input holds NaN or infinity, in image 8",
    }
    with pytest.raises(BadInput, match=r"^the input holds NaN or infinity, in image 3$"):
        scanned(handle, inputs, {"conv": [top]}, skip_failures=False)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_hold_nan_are_an_error_that_names_the_image(bad: float) -> None:
    handle, inputs = exact(10)

    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x >= x.amax() if x.amax() > 100 else x.isnan(), bad)

    handle.module.relu = Spoils()
    inputs[5, 0, 0, 0] = 77
    with pytest.raises(BadInput, match=r"^layer 'relu' holds NaN or infinity for image 5$"):
        scanned(handle, inputs, {"relu": [Top(1, largest=bad < 0)]}, batch_size=4)


def test_large_values_are_no_infinity() -> None:
    handle, inputs = exact(4)
    top = Top(1)
    scanned(handle, inputs.double().sign().float() * 1e36, {"relu": [top]})  # whose sum float32 cannot hold
    assert top.compute().scores.isfinite().all()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_data_set_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    handle = tl.wrap(Exact().eval(), input_size=(3, 8, 8))
    with pytest.raises(BadInput, match=r"none of the 3 images could be read; the first: .*00\.png is not an image"):
        scanned(handle, spoiled(tmp_path, range(3), 3), {"conv": [Top(1)]})
    with pytest.raises(BadInput, match="the data set is empty"):
        scanned(handle, Stream(torch.empty(0, 3, 8, 8)), {"conv": [Top(1)]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is at least 1; got 0"),
        ({"batch_size": -3}, "batch_size is at least 1; got -3"),
        ({"workers": -1}, "workers is at least 0"),
        ({"autocast": torch.float32}, "autocast is torch.bfloat16 or torch.float16.*got torch.float32"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    handle, inputs = exact()
    with pytest.raises(BadInput, match=message):
        scanned(handle, inputs, {"conv": [Top(1)]}, **options)


def test_layers_that_are_not_there_are_refused() -> None:
    handle, inputs = exact()
    with pytest.raises(UnknownName, match="conv"):
        scanned(handle, inputs, {"convv": [Top(1)]})
    with pytest.raises(BadInput, match="no layer was named"):
        scanned(handle, inputs, {})
    handle, inputs = SPECIMENS["nhwc"]()
    with pytest.raises(
        BadInput, match=r"'window_block.attn.softmax' gives no map of channels at inputs of \[3, 32, 32\]"
    ):
        scanned(handle, inputs, {"window_block.attn.softmax": [Top(1)]})


# -- precision --------------------------------------------------------------------------------------------------------


def test_autocast_computes_in_the_type_asked_for() -> None:
    handle, _ = SPECIMENS["residual"]()
    inputs, seen = images(handle), set()  # type: Tensor, set[torch.dtype]

    class Looks(Features):
        def look(self, maps: Tensor, indices: Tensor) -> Tensor:
            seen.add(maps.dtype)
            return super().look(maps, indices)

    fast, slow = Looks(), Features()
    scanned(handle, inputs, {"layer2.conv2": [fast]}, autocast=torch.bfloat16)
    scanned(handle, inputs, {"layer2.conv2": [slow]})
    assert seen == {torch.bfloat16}
    found, expected = fast.compute()[1], slow.compute()[1]
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * expected.abs().max().item())
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_in_float64_stays_in_float64() -> None:
    handle, _ = SPECIMENS["plain"]()
    inputs = images(handle).double()
    handle.module.double()
    top, features = Top(3), Features()
    scanned(handle, inputs, {"relu2": [top, features]}, batch_size=1)
    expected = plain_top(plainly(handle, "relu2", inputs), 3)
    assert top.compute().scores.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(vars(top.compute()).values(), expected, strict=True))
    assert features.compute()[1].dtype == torch.float64
    with pytest.raises(BadInput, match="not in float64"):
        scanned(handle, inputs, {"relu2": [Top(1)]}, autocast=torch.bfloat16)


# -- no trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_scan_leaves_no_trace(around: Callable[[], Any]) -> None:
    handle, _ = SPECIMENS["inplace"]()
    handle.module.train()
    inputs = images(handle)
    handle.trace()
    plain = Top(5)
    scanned(handle, inputs, {"relu": [plain]}, batch_size=4)
    with around():
        before, top = Snapshot(handle.module, inputs), Top(5)
        scanned(handle, DataLoader(TensorDataset(inputs), 4, shuffle=True), {"relu": [top]})
        assert before.differences() == []
    require_same({"relu": [top]}, {"relu": [plain]})


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
@pytest.mark.parametrize("where", ["progress", "model"])
def test_a_scan_that_is_interrupted_leaves_no_trace(error: type[BaseException], where: str) -> None:
    handle, inputs = exact(60)
    handle.trace()
    handle.module.train()
    calls, forward = [0], handle.module.pool.forward

    def fails(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise error("in the middle")
        return forward(*given) if where == "model" else None

    if where == "model":
        handle.module.pool.forward = fails
    before = Snapshot(handle.module, inputs)
    data = open_data(DataLoader(TensorDataset(inputs), 4, shuffle=True, num_workers=2), handle.spec)
    options: dict[str, Any] = {"progress": fails} if where == "progress" else {}
    with pytest.raises(error) as caught:
        scan(handle, data, {"deep": [Top(3)]}, **options)
    assert multiprocessing.active_children() == []
    assert before.differences() == []
    assert "in the middle" in str(caught.value)
