"""Data sets of any kind, read image by image: what cannot be read is listed, the rest goes on.

A folder (class subfolders give labels), a list of images, a float tensor `[N, C, H, W]`, a torch `Dataset` or a
`DataLoader`, whose items are an image or `(image, label, ...)`. Images are what `images.read` takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing import get_all_start_methods, get_start_method
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, default_convert

from torchloupe_core import images as pictures
from torchloupe_core.borrow import kept_randomness
from torchloupe_core.errors import BadInput
from torchloupe_core.spec import Spec

__all__ = ["DataSet", "Sample", "batches", "class_names", "open_data"]

FILES_A_WORKER = 256  # fewer files than this are read sooner than a worker starts
UNREADABLE = (BadInput, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # about one image


@dataclass(frozen=True)
class Sample:
    """One item of a data set: a model input `[C, H, W]`, or why there is none."""

    index: int
    inputs: Tensor | None
    label: int | None = None
    error: str | None = None


class DataSet:
    """Items by index, in order. `names` are the files of a folder or list of paths, else None.

    order: the indices to go through, all of them unless given. classes: the names of a folder's class subfolders.
    collate: what a loader makes a batch with. workers, batch_size: what a loader states.
    """

    def __init__(
        self,
        items: Any,
        spec: Spec,
        *,
        order: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        classes: tuple[str, ...] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        workers: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.items, self.spec, self.names, self.labels, self.classes = items, spec, names, labels, classes
        self.workers, self.batch_size = workers, batch_size
        self._collate = collate
        self.streams = isinstance(items, IterableDataset)
        self.order = order if order is not None or self.streams else range(len(items))

    def __len__(self) -> int:
        """How many items; a stream raises `TypeError`."""
        if self.order is None:
            raise TypeError("a stream has no length")
        return len(self.order)

    @property
    def length(self) -> int | None:
        """How many items, None for a stream."""
        return None if self.order is None else len(self.order)

    def name(self, index: int) -> str:
        """What to call an item in messages and titles."""
        return self.names[index] if self.names is not None else f"image {index}"

    def read(self, index: int) -> Sample:
        """One item as a model input; a stream is read again from its beginning."""
        if self.streams:
            return next(self.read_each([index]))
        try:
            item = self.items[index]
        except UNREADABLE as error:
            return _unreadable(index, error)
        return self.sample(index, item)

    def read_each(self, indices: Sequence[int]) -> Iterator[Sample]:
        """Several items by rising index, each opened once; a stream is gone through once more."""
        wanted = sorted(set(indices))
        if not self.streams:
            yield from (self.read(index) for index in wanted)
            return
        lacking = set(wanted)
        for index, item in zip(range(max(wanted, default=-1) + 1), self.items, strict=False):
            if index in lacking:
                lacking.remove(index)
                yield self.sample(index, item)
        yield from (Sample(index, None, error="the stream ended before it, read again") for index in sorted(lacking))

    def samples(self) -> Iterator[Sample]:
        """All items, one after another."""
        if self.order is None:
            return (self.sample(index, item) for index, item in enumerate(self.items))
        return (self.read(index) for index in self.order)

    def sample(self, index: int, item: Any) -> Sample:
        """An item read into a model input, or the reason why it cannot be."""
        try:
            image, label = self.taken_apart(item)
            inputs = pictures.read_one(image, self.spec, self.name(index))
        except UNREADABLE as error:
            return _unreadable(index, error)
        return Sample(index, inputs, self.labels[index] if label is None and self.labels is not None else label)

    def taken_apart(self, item: Any) -> tuple[Any, int | None]:
        """The image of an item, and its label where it has one that names a class."""
        item = self._collate(item) if self._collate is not None else item
        if not isinstance(item, (tuple, list)):
            return item, None
        if not item:
            raise BadInput("an item of the data set is empty; it is an image or (image, label)")
        return item[0], _whole_number(item[1]) if len(item) > 1 else None


def open_data(data: Any, spec: Spec) -> DataSet:
    """A data set from what a user gave; a store stands for the files that it is of.

    Raises `BadInput` if it is empty or nothing of the kind.
    """
    if isinstance(data, DataSet):
        return data
    if isinstance(data, (str, os.PathLike)):
        return _stored(Path(data), spec) or _folder(Path(data), spec)
    if isinstance(data, DataLoader):
        return _loader(data, spec)
    if isinstance(data, IterableDataset):
        return DataSet(data, spec)
    if isinstance(data, (Tensor, np.ndarray)) and data.ndim != 4:
        raise BadInput(f"a data set in one array is [N, C, H, W], or [N, H, W, C] of uint8; got {list(data.shape)}")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, dict):
        raise BadInput(
            f"a data set is a folder, a list of images, a torch Dataset or a DataLoader; got {type(data).__name__}"
        )
    if not len(data):
        raise BadInput("the data set is empty")
    paths = isinstance(data, (list, tuple)) and all(isinstance(one, (str, os.PathLike)) for one in data)
    return DataSet(data, spec, names=[str(one) for one in data] if paths else None)


def class_names(data: DataSet) -> tuple[str, ...] | None:
    """The names a data set states: a folder's class subfolders, or `classes` of a torch `Dataset`."""
    stated = data.classes if data.classes is not None else getattr(data.items, "classes", None)
    if isinstance(stated, (tuple, list)) and stated and all(isinstance(one, str) for one in stated):
        return tuple(stated)
    return None


def batches(
    data: DataSet, size: int, workers: int | None = None, positions: Iterable[int] | None = None
) -> Generator[list[Sample], None, None]:
    """Samples in lists of `size`, read ahead by worker processes where there are many files.

    workers: how many; None chooses: the loader's own, else none for data in memory and up to four for files. They end
    when the iterator is closed. positions: which to read, by their place in the data set's order; all unless given.
    """
    workers = _workers(data, workers)
    reading: Dataset[Any] = _Stream(data) if data.streams else _Indexed(data)
    packing = _packed if workers else list
    seed = torch.Generator()  # or a loader takes its seed from the global random state
    loader = DataLoader(reading, size, sampler=positions, num_workers=workers, collate_fn=packing, generator=seed)
    iterator = iter(loader)
    try:
        for part in iterator:
            yield _unpacked(*part) if workers else part
    finally:
        # An exception that someone holds on to holds the iterator, and that its processes.
        getattr(iterator, "_shutdown_workers", lambda: None)()


class _Indexed(Dataset[Sample]):
    def __init__(self, data: DataSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Sample:
        order = self.data.order
        return self.data.read(position if order is None else order[position])


class _Stream(IterableDataset[Sample]):
    def __init__(self, data: DataSet) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Sample]:
        return self.data.samples()


Packed = tuple[list[Sample], list[tuple[list[int], Tensor]]]


def _packed(samples: list[Sample]) -> Packed:
    """For the way between processes, images of one kind in one tensor: each tensor takes an open file."""
    kinds: dict[Any, list[int]] = {}
    for place, sample in enumerate(samples):
        if sample.inputs is not None:
            kinds.setdefault((sample.inputs.shape, sample.inputs.dtype), []).append(place)
    bare = [replace(sample, inputs=None) for sample in samples]
    found = [(places, [samples[place].inputs for place in places]) for places in kinds.values()]
    return bare, [(places, torch.stack([one for one in inputs if one is not None])) for places, inputs in found]


def _unpacked(samples: list[Sample], stacks: list[tuple[list[int], Tensor]]) -> list[Sample]:
    for places, stack in stacks:
        for place, inputs in zip(places, stack, strict=True):
            samples[place] = replace(samples[place], inputs=inputs)
    return samples


def _stored(folder: Path, spec: Spec) -> DataSet | None:
    """The files that a store is of."""
    from torchloupe_core.store import Store, is_store  # which builds on this file
    from torchloupe_core.stored import stored_data

    return stored_data(Store.open(folder), spec) if is_store(folder) else None


def _folder(folder: Path, spec: Spec) -> DataSet:
    if not folder.exists():
        raise BadInput(f"no such folder: {folder}")
    paths = pictures.find(folder) if folder.is_dir() else [folder]
    names = [str(path) for path in paths]
    if any(path == folder or path.parent == folder for path in paths):
        return DataSet(paths, spec, names=names)
    parents = [path.relative_to(folder).parts[0] for path in paths]
    classes = {name: label for label, name in enumerate(sorted(set(parents)))}
    return DataSet(paths, spec, names=names, labels=[classes[parent] for parent in parents], classes=tuple(classes))


def _loader(loader: DataLoader[Any], spec: Spec) -> DataSet:
    """The items a loader would give, each once, by rising index in its data set; its batch size and workers are kept.

    So a shuffled loader gives the same as one in order. A stream is read by this process.
    """
    alone, own = loader.batch_sampler is None, loader.collate_fn not in (default_collate, default_convert)
    collate = None if not own else loader.collate_fn if alone else partial(_one_of_a_batch, loader.collate_fn)
    facts: dict[str, Any] = {"workers": loader.num_workers, "batch_size": loader.batch_size, "collate": collate}
    if isinstance(loader.dataset, IterableDataset):
        return DataSet(loader.dataset, spec, **facts)
    with kept_randomness():
        order = list(loader.sampler if loader.batch_sampler is None else chain.from_iterable(loader.batch_sampler))
    if not order:
        raise BadInput("the data loader gives nothing")
    return DataSet(loader.dataset, spec, order=sorted(set(map(int, order))), **facts)


def _one_of_a_batch(collate: Callable[[list[Any]], Any], item: Any) -> Any:
    """What a loader's own function makes of an item: in columns, `(images, labels)`, or a list of items, or images."""
    batch = collate([item])
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[0][0], batch[1][0] if isinstance(batch[1], (Tensor, np.ndarray, tuple, list)) else None
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0][0] if isinstance(batch[0], (Tensor, np.ndarray)) and batch[0].ndim == 4 else batch[0]
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch[0]
    raise BadInput(f"a loader's batch is images or (images, labels, ...); its collate_fn gives {type(batch).__name__}")


def _whole_number(label: Any) -> int | None:
    """A label that names one class; one-hot vectors, boxes, texts do not."""
    if isinstance(label, Tensor):
        label = label.numpy(force=True)
    if isinstance(label, np.ndarray) and label.size == 1:
        label = label.reshape(-1)[0]
    return int(label) if isinstance(label, (int, np.integer)) else None


def _unreadable(index: int, error: BaseException) -> Sample:
    return Sample(index, None, error=str(error) or type(error).__name__)


def _workers(data: DataSet, given: int | None) -> int:
    if given is not None and (given < 0 or (given and data.streams)):
        raise BadInput(f"workers is at least 0, and 0 for a stream, which has one reader; got {given}")
    if given is not None or data.streams:
        return given or 0
    if data.workers is not None:
        return data.workers
    starts = get_start_method(allow_none=True) or get_all_start_methods()[0]
    if data.names is None or starts != "fork":  # other ways to start run the user's script again
        return 0
    return min(4, os.cpu_count() or 1, len(data) // FILES_A_WORKER)
