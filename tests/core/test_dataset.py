"""Data sets of every kind, read item by item; what cannot be read is listed and the rest is done."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from torchloupe_core import dataset as module
from torchloupe_core.dataset import DataSet, Sample, batches, open_data
from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.spec import Spec

SPEC = Spec(input_size=(3, 8, 8), fixed_size=True)
FREE = Spec()


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 2 * shade, 0))


def folder(path: Path, names: str) -> Path:
    """Pictures of shades 1, 2, 3 ... under these names."""
    for shade, name in enumerate(names.split(), 1):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(shade).save(path / name)
    return path


def read(data: DataSet, size: int = 4, workers: int | None = None) -> list[Sample]:
    return [sample for part in batches(data, size, workers) for sample in part]


def shades(samples: list[Sample]) -> list[int]:
    """Which pictures these are."""
    return [round(sample.inputs[0, 0, 0].item() * 255) for sample in samples if sample.inputs is not None]


def inputs(n: int = 6) -> Tensor:
    """Model inputs that hold 0/255, 1/255, ... everywhere."""
    return (torch.arange(n) / 255)[:, None, None, None].expand(n, 3, 8, 8).clone()


class Items(Dataset[Any]):
    """What a function gives for each index."""

    def __init__(self, item: Callable[[int], Any], n: int = 6) -> None:
        self.item, self.n = item, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


class Stream(IterableDataset[Any]):
    def __init__(self, item: Callable[[int], Any], n: int = 6) -> None:
        self.item, self.n = item, n

    def __iter__(self) -> Iterator[Any]:
        return (self.item(index) for index in range(self.n))


# -- kinds ------------------------------------------------------------------------------------------------------------


def test_a_folder(tmp_path: Path) -> None:
    data = open_data(folder(tmp_path, "b.png a.png c.JPG"), SPEC)
    samples = read(data)
    assert len(data) == data.length == 3
    assert [data.name(index) for index in range(3)] == [str(tmp_path / name) for name in ("a.png", "b.png", "c.JPG")]
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert shades(samples)[:2] == [2, 1]
    assert data.labels is None and data.classes is None
    assert {sample.label for sample in samples} == {None}


@pytest.mark.parametrize("given", [str, Path])
def test_class_subfolders_give_labels(tmp_path: Path, given: Callable[[Path], Any]) -> None:
    data = open_data(given(folder(tmp_path, "dog/x.png cat/z.png cat/more/y.png elk/a.png")), SPEC)
    assert data.classes == ("cat", "dog", "elk")
    assert [(sample.label, shade) for sample, shade in zip(read(data), shades(read(data)), strict=True)] == [
        (0, 3),
        (0, 2),
        (1, 1),
        (2, 4),
    ]


def test_pictures_beside_subfolders_have_no_labels(tmp_path: Path) -> None:
    data = open_data(folder(tmp_path, "dog/x.png a.png"), SPEC)
    assert data.classes is None
    assert {sample.label for sample in read(data)} == {None}
    one = open_data(tmp_path / "a.png", SPEC)
    assert (len(one), shades(read(one)), one.name(0)) == (1, [2], str(tmp_path / "a.png"))


def test_lists_and_arrays(tmp_path: Path) -> None:
    folder(tmp_path, "b.png a.png")
    names = [tmp_path / "b.png", str(tmp_path / "a.png")]
    arrays = np.stack([np.asarray(picture(shade)) for shade in (1, 2)])
    for given in (
        names,
        tuple(names),
        [picture(1), picture(2)],
        [picture(1), names[1]],
        arrays,
        list(arrays),
        torch.from_numpy(arrays).permute(0, 3, 1, 2),
        inputs()[1:3],
        list(inputs()[1:3]),
    ):
        data = open_data(given, SPEC)
        assert shades(read(data)) == [1, 2]
        assert shades([data.read(1)]) == [2]
    assert open_data(names, SPEC).name(1) == str(tmp_path / "a.png")
    assert open_data([picture(1), names[1]], SPEC).name(1) == "image 1"
    assert open_data(data, FREE) is data


def test_inputs_keep_their_precision_and_are_nobodys_own() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        given = inputs().to(dtype)
        sample = open_data(given, SPEC).read(2)
        assert sample.inputs is not None and sample.inputs.dtype == dtype
        assert torch.equal(sample.inputs, given[2])
        sample.inputs.zero_()
        assert given[2].all()


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (4, 4),
        (np.int64(4), 4),
        (torch.tensor(4), 4),
        (torch.tensor([4]), 4),
        (np.array(4), 4),
        (torch.tensor([0, 0, 1]), None),  # one-hot
        (torch.tensor(0.7), None),
        (0.7, None),
        (None, None),
        ("cat", None),
        ({"boxes": []}, None),
    ],
)
@pytest.mark.parametrize("kind", [Items, Stream])
def test_labels_are_whole_numbers_or_none(kind: Any, label: Any, expected: int | None) -> None:
    data = open_data(kind(lambda index: (picture(index), label, "more")), SPEC)
    assert [sample.label for sample in read(data)] == [expected] * 6
    assert shades(read(data)) == list(range(6))
    data = open_data(kind(lambda index: [picture(index)]), SPEC)
    assert [sample.label for sample in read(data)] == [None] * 6
    assert shades(read(open_data(kind(picture), SPEC))) == list(range(6))


def test_a_stream_has_no_length_and_is_read_again_for_its_images() -> None:
    data = open_data(Stream(picture, 10), SPEC)
    assert data.length is None
    with pytest.raises(TypeError, match="no length"):
        len(data)
    assert shades(read(data)) == list(range(10))
    assert [sample.index for sample in read(data)] == list(range(10))
    assert shades([data.read(7)]) == [7]
    assert shades(list(data.read_each([7, 2, 7]))) == [2, 7]
    assert data.read(12).error == "the stream ended before it, read again"
    with pytest.raises(BadInput, match="one reader; got 2"):
        read(data, workers=2)


def test_several_items_are_each_opened_once() -> None:
    opened: list[int] = []

    def item(index: int) -> Image.Image:
        opened.append(index)
        return picture(index)

    for kind, expected in ((Items, [2, 4]), (Stream, [0, 1, 2, 3, 4])):
        opened.clear()
        found = list(open_data(kind(item), SPEC).read_each([4, 2, 4, 2]))
        assert ([sample.index for sample in found], shades(found)) == ([2, 4], [2, 4])
        assert opened == expected
    assert list(open_data(Stream(picture), SPEC).read_each([])) == []


# -- loaders ----------------------------------------------------------------------------------------------------------

PAIRS = TensorDataset(inputs(), torch.arange(10, 16))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 4}, range(6)),
        ({"batch_size": 4, "drop_last": True}, range(4)),
        ({"batch_size": 4, "shuffle": True}, range(6)),
        ({"batch_size": 4, "sampler": SubsetRandomSampler([5, 1, 3])}, [1, 3, 5]),
        ({"batch_sampler": BatchSampler([4, 0, 2], 2, drop_last=True)}, [0, 4]),
        ({"sampler": WeightedRandomSampler([0, 1.0, 0, 0, 1, 0], 50)}, [1, 4]),  # each once
        ({"batch_size": None}, range(6)),
        ({"batch_size": None, "collate_fn": lambda item: (item[0].flip(1), item[1])}, range(6)),
        ({"collate_fn": lambda items: items}, range(6)),
        ({"collate_fn": lambda items: tuple(zip(*items, strict=True))}, range(6)),
        ({"num_workers": 2, "batch_size": 2}, range(6)),
    ],
)
def test_a_loader_gives_its_items_by_their_own_index(options: dict[str, Any], expected: Any) -> None:
    data = open_data(DataLoader(PAIRS, **options), SPEC)
    samples = read(data)
    assert [sample.index for sample in samples] == list(expected)
    assert shades(samples) == list(expected)
    assert [sample.label for sample in samples] == [10 + index for index in expected]
    assert len(data) == len(list(expected))
    assert data.workers == options.get("num_workers", 0)
    assert data.batch_size == (None if "batch_sampler" in options else options.get("batch_size", 1))


def test_a_loader_without_batches_gives_pictures_as_they_are() -> None:
    arrays = Items(lambda index: (np.asarray(picture(index)), index))
    samples = read(open_data(DataLoader(arrays, batch_size=None), SPEC))
    assert shades(samples) == [sample.label for sample in samples] == list(range(6))


@pytest.mark.parametrize(
    ("collate", "label"),
    [
        (lambda items: torch.stack([one[0] for one in items]), None),
        (lambda items: (torch.stack([one[0] for one in items]), torch.tensor([one[1] for one in items])), 10),
        (lambda items: (torch.stack([one[0] for one in items]), {"labels": 1}), None),
        (lambda items: [one[0] for one in items], None),
        (lambda items: [torch.stack([one[0] for one in items])], None),
        (lambda items: np.stack([(one[0] * 255).byte().permute(1, 2, 0).numpy() for one in items]), None),
    ],
)
def test_a_loaders_own_collate_is_used(collate: Callable[[Any], Any], label: int | None) -> None:
    samples = read(open_data(DataLoader(PAIRS, collate_fn=collate), SPEC))
    assert shades(samples) == list(range(6))
    assert samples[0].label == label


def test_a_collate_that_gives_no_images_is_named() -> None:
    data = open_data(DataLoader(PAIRS, collate_fn=lambda items: {"image": items}), SPEC)
    assert "its collate_fn gives dict" in (data.read(0).error or "")


def test_a_loader_of_a_stream() -> None:
    data = open_data(DataLoader(Stream(lambda index: (picture(index), index)), batch_size=3, num_workers=2), SPEC)
    assert [sample.label for sample in read(data)] == list(range(6))
    assert (data.length, data.batch_size) == (None, 3)


def test_opening_and_reading_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    read(open_data(DataLoader(PAIRS, shuffle=True), SPEC))
    read(open_data(PAIRS, SPEC), workers=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[index, arg-type]


# -- what cannot be read ----------------------------------------------------------------------------------------------


def spoiled(path: Path) -> Path:
    folder(path, "a.png b.png c.png d.png e.png f.png")
    (path / "b.png").write_bytes(b"")
    (path / "d.png").write_bytes(b"no picture at all")
    whole = (path / "e.png").read_bytes()
    (path / "e.png").write_bytes(whole[:-25])
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_cannot_be_read_have_a_reason(tmp_path: Path, workers: int) -> None:
    samples = read(open_data(spoiled(tmp_path), SPEC), workers=workers)
    assert [sample.inputs is None for sample in samples] == [False, True, False, True, True, False]
    assert shades(samples) == [1, 3, 6]
    errors = [sample.error or "" for sample in samples]
    assert "b.png is empty" in errors[1] and "d.png is not an image" in errors[3] and "e.png cannot be" in errors[4]


BAD: list[tuple[Any, str]] = [
    (torch.full((3, 8, 8), torch.nan), "image 2"),
    (torch.full((3, 8, 8), torch.inf), "NaN or infinity, in image 2"),
    (torch.zeros(1, 8, 8), "takes 3 channels"),
    (torch.zeros(3, 9, 8), r"\[3, 8, 8\] only"),
    (torch.zeros(8, 8), r"\[N, C, H, W\]"),
    (torch.zeros(1, 3, 8, 8), r"\[N, C, H, W\]"),
    (np.zeros((8, 8, 3)), "image 2 is an array of float64"),
    ("no/such/file.png", "no such image file: no/such/file.png"),
    ({"image": 1}, "image 2 is dict"),
    ((), "empty"),
    (None, "image 2 is NoneType"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
@pytest.mark.parametrize("kind", [Items, Stream])
def test_items_that_are_no_image_have_a_reason(kind: Any, bad: Any, reason: str) -> None:
    samples = read(open_data(kind(lambda index: bad if index == 2 else picture(index)), SPEC))
    assert shades(samples) == [0, 1, 3, 4, 5]
    with pytest.raises(BadInput, match=reason):
        raise BadInput(samples[2].error)


def raising(error: BaseException) -> Callable[[int], Any]:
    def item(index: int) -> Any:
        if index == 2:
            raise error
        return picture(index)

    return item


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [OSError("broken pipe"), ValueError("bad size"), ValueError(), Image.DecompressionBombError("bomb")]
)
def test_a_data_set_that_fails_on_one_image_goes_on(error: Exception, workers: int) -> None:
    samples = read(open_data(Items(raising(error)), SPEC), workers=workers)
    assert shades(samples) == [0, 1, 3, 4, 5]
    assert samples[2].error == (str(error) or "ValueError")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [KeyError("wrong"), ZeroDivisionError("wrong"), MissingDependency("wrong")])
def test_other_errors_of_a_data_set_come_out_as_they_are(error: Exception, workers: int) -> None:
    with pytest.raises(type(error), match="wrong"):
        read(open_data(Items(raising(error)), SPEC), 2, workers)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("close", [True, False])
def test_workers_end_with_the_iterator(close: bool) -> None:
    reading = batches(open_data(Items(picture, 100), SPEC), 2, workers=2)
    next(reading)
    assert len(multiprocessing.active_children()) == 2
    if close:
        reading.close()
    else:
        with pytest.raises(KeyError) as held:
            reading.throw(KeyError())
        assert held.value is not None  # and its traceback, which holds the loader
    assert multiprocessing.active_children() == []


# -- bad data sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the data set is empty"),
        (inputs(0), "the data set is empty"),
        (Items(picture, 0), "the data set is empty"),
        (DataLoader(PAIRS, batch_size=7, drop_last=True), "the data loader gives nothing"),
        ("no/such/folder", "no such folder: no/such/folder"),
        (inputs()[0], r"\[N, C, H, W\].*got \[3, 8, 8\]"),
        (np.zeros((8, 8, 3), np.uint8), r"got \[8, 8, 3\]"),
        (picture(1), "got Image"),
        ({"a": picture(1)}, "got dict"),
        ((picture(one) for one in range(3)), "got generator"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_data_set_is_refused(given: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_data(given, SPEC)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(BadInput, match="no images in"):
        open_data(tmp_path, SPEC)


# -- worker processes -------------------------------------------------------------------------------------------------


def test_images_of_several_kinds_come_through_a_worker() -> None:
    kinds = [torch.rand(3, 8, 8), torch.rand(3, 4, 6), torch.rand(3, 8, 8).double(), None, torch.rand(3, 8, 8)]
    data = open_data(Items(lambda index: kinds[index % 5], 23), FREE)
    for alone, through in zip(read(data, 7), read(data, 7, workers=2), strict=True):
        assert (through.index, through.error) == (alone.index, alone.error)
        if alone.inputs is None:
            assert through.inputs is None
        else:
            assert through.inputs is not None and through.inputs.dtype == alone.inputs.dtype
            assert torch.equal(through.inputs, alone.inputs)


def test_many_files_are_read_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: 64)

    def chosen(data: DataSet, given: int | None = None) -> int:
        return module._workers(data, given)

    def files(n: int) -> DataSet:
        return open_data([f"{place}.png" for place in range(n)], SPEC)

    assert [chosen(files(n)) for n in (1, 255, 256, 600, 10_000)] == [0, 0, 1, 2, 4]
    assert chosen(files(10_000), 1) == 1
    assert chosen(open_data(inputs(600), SPEC)) == 0
    assert chosen(open_data(DataLoader(PAIRS, num_workers=2), SPEC)) == 2
    assert chosen(open_data(DataLoader(PAIRS, num_workers=2), SPEC), 0) == 0
    monkeypatch.setattr(module, "get_start_method", lambda allow_none: "spawn")
    assert chosen(files(10_000)) == 0
    with pytest.raises(BadInput, match="got -1"):
        chosen(files(3), -1)
