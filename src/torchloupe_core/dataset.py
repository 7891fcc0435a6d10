"""Data sets of any kind, read image by image: what cannot be read is listed, the rest goes on.

A folder (class subfolders give labels), a list of images, a float tensor `[N, C, H, W]`, a torch `Dataset` or a
`DataLoader`, whose items are an image or `(image, label, ...)`. Images are what `images.read` takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from torchloupe_core import images as pictures
from torchloupe_core.errors import BadInput, LoupeError
from torchloupe_core.spec import Spec

__all__ = ["DataSet", "Sample", "batches", "open_data"]

CPU = torch.device("cpu")
FILES_A_WORKER = 256  # fewer files than this are read sooner than a worker starts


@dataclass(frozen=True)
class Sample:
    """One item of a data set: a model input `[C, H, W]`, or why there is none."""

    index: int
    inputs: Tensor | None
    label: int | None = None
    error: str | None = None


class DataSet:
    """Items by index, in order. `names` are the files of a folder or list of paths, else None.

    classes: the names of a folder's class subfolders. length: None for a stream.
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
            (item,) = islice(iter(self.items), index, index + 1)
            return self.sample(index, lambda: item)
        return self.sample(index, lambda: self.items[index])

    def read_many(self, indices: Sequence[int]) -> dict[int, Sample]:
        """Several items, each opened once; a stream in one go."""
        wanted = set(indices)
        if not self.streams:
            return {index: self.read(index) for index in sorted(wanted)}
        seen = zip(range(max(wanted, default=-1) + 1), iter(self.items), strict=False)
        return {index: self.sample(index, lambda item=item: item) for index, item in seen if index in wanted}  # type: ignore[misc]

    def sample(self, index: int, item: Callable[[], Any]) -> Sample:
        """An item read into a model input, or the reason why it cannot be."""
        try:
            image, label = self._taken_apart(item())
            if label is None and self.labels is not None:
                label = self.labels[index]
            single = image if isinstance(image, (str, os.PathLike)) else [image]
            return Sample(index, pictures.read(single, self.spec, device=CPU, dtype=torch.float32)[0], label)
        except (LoupeError, OSError, ValueError, SyntaxError) as error:
            return Sample(index, None, error=str(error))

    def _taken_apart(self, item: Any) -> tuple[Any, int | None]:
        if self._collate is not None:
            batch = self._collate([item])
            item = tuple(one[0] for one in batch) if isinstance(batch, (tuple, list)) else batch[0]
        if not isinstance(item, (tuple, list)):
            return item, None
        if not item:
            raise BadInput("an item of the data set is empty; it is an image or (image, label)")
        label = item[1] if len(item) > 1 else None
        whole = isinstance(label, int) or (isinstance(label, Tensor) and label.numel() == 1)
        return item[0], int(label) if whole and label is not None else None


def open_data(data: Any, spec: Spec) -> DataSet:
    """A data set from what a user gave. Raises `BadInput` if it is empty or nothing of the kind."""
    if isinstance(data, DataSet):
        return data
    if isinstance(data, (str, os.PathLike)):
        return _folder(Path(data), spec)
    if isinstance(data, DataLoader):
        return _loader(data, spec)
    if isinstance(data, IterableDataset):
        return DataSet(data, spec)
    if isinstance(data, Tensor) and data.ndim != 4:
        raise BadInput(f"a data set of tensors is [N, C, H, W]; got {list(data.shape)}")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, dict):
        raise BadInput(
            f"a data set is a folder, a list of images, a torch Dataset or a DataLoader; got {type(data).__name__}"
        )
    if not len(data):
        raise BadInput("the data set is empty")
    paths = isinstance(data, (list, tuple)) and all(isinstance(one, (str, os.PathLike)) for one in data)
    return DataSet(data, spec, names=[str(one) for one in data] if paths else None)


def batches(data: DataSet, size: int, workers: int | None = None) -> Iterator[list[Sample]]:
    """Samples in lists of `size`, read ahead by worker processes where there are many files.

    workers: how many; None chooses: the loader's own, else none for data in memory and up to four for files.
    """
    workers = 0 if data.streams else _workers(data) if workers is None else workers  # a stream has one reader
    reading: Dataset[Any] = _Stream(data) if data.streams else _Indexed(data)
    return iter(DataLoader(reading, size, num_workers=workers, collate_fn=list, persistent_workers=False))


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
        return (self.data.sample(index, lambda item=item: item) for index, item in enumerate(self.data.items))  # type: ignore[misc]


def _folder(folder: Path, spec: Spec) -> DataSet:
    if not folder.exists():
        raise BadInput(f"no such folder: {folder}")
    paths = pictures.find(folder) if folder.is_dir() else [folder]
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in paths]
    names = [str(path) for path in paths]
    if None in parents or not folder.is_dir():
        return DataSet(paths, spec, names=names)
    classes = tuple(sorted({parent for parent in parents if parent is not None}))
    labels = [classes.index(parent) for parent in parents if parent is not None]
    return DataSet(paths, spec, names=names, labels=labels, classes=classes)


def _loader(loader: DataLoader[Any], spec: Spec) -> DataSet:
    """The items a loader would give, by their index in its data set; its order, batch size and workers are kept."""
    own = None if loader.collate_fn is default_collate else loader.collate_fn
    facts: dict[str, Any] = {"workers": loader.num_workers, "batch_size": loader.batch_size, "collate": own}
    if isinstance(loader.dataset, IterableDataset):
        return DataSet(loader.dataset, spec, **facts)
    sampled = chain.from_iterable(loader.batch_sampler) if loader.batch_sampler is not None else loader.sampler
    order = [int(index) for index in sampled]
    if not order:
        raise BadInput("the data loader gives nothing")
    return DataSet(loader.dataset, spec, order=order, **facts)


def _workers(data: DataSet) -> int:
    if data.workers is not None:
        return data.workers
    if data.names is None:
        return 0
    return min(4, os.cpu_count() or 1, len(data) // FILES_A_WORKER)
