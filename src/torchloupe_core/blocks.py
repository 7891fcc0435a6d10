"""A scan in blocks of images: each is done by itself and stored, and what is stored is not done again.

The blocks, the batches within them and the order in which their statistics are merged depend on the store alone. So
the answer is the same to the last bit whether a scan ran through or was killed and went on any number of times, and
whichever process did which block, on machines of one kind with one version of torch.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.borrow import kept_threads
from torchloupe_core.dataset import DataSet, Sample, batches
from torchloupe_core.errors import StoreError
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.pace import Pace
from torchloupe_core.scan import Joint, Pass, Report, Scanned, computing
from torchloupe_core.statistics import Statistic
from torchloupe_core.store import Damaged, Store, packed

__all__ = ["Done", "Work", "merged", "scanned", "state_of"]

Done = Callable[[int, bytes], None]


@dataclass(frozen=True)
class Work:
    """What it takes to do blocks of a store, in this process or, sent there, in another.

    folder: where the files of the data set lie here.
    """

    handle: Handle
    data: DataSet
    statistics: Mapping[str, Sequence[Statistic]]
    joint: Joint | None
    store: Store
    folder: str | None = None
    workers: int | None = None
    autocast: torch.dtype | None = None
    skip_failures: bool = True

    def run(self, blocks: Iterable[int], done: Done, progress: Report = lambda done, total: None) -> None:
        """Does blocks one after the other and hands each over as the bytes that are stored; `blocks` is read ahead."""
        begun: deque[int] = deque()

        def positions() -> Iterator[int]:
            for block in blocks:
                begun.append(block)
                yield from self.store.positions(block)

        size = self.store.computing["batch_size"]
        with (
            contextlib.closing(batches(self.data, max(1, size // 2), self.workers, positions())) as parts,
            self.handle.borrow(),
            computing(self.handle, self.autocast),
            kept_threads(self.store.computing["threads"]),
        ):
            ahead = _Ahead(parts)
            while ahead.more():
                block = begun.popleft()
                done(block, self._done(block, ahead, progress))

    def _done(self, block: int, ahead: _Ahead, progress: Report) -> bytes:
        places, found = self.store.positions(block), Scanned()
        fresh = {layer: [one.fresh() for one in several] for layer, several in self.statistics.items()}
        joint = self.joint and Joint(self.joint.targets, [one.fresh() for one in self.joint.statistics])
        asked = Pass(self.handle, self.data, fresh, joint)
        pace = _Fixed(self.store.computing["batch_size"], settled=True)
        parts = ahead.take(len(places))
        asked.go_through(parts, len(places), pace, found, skip_failures=self.skip_failures, progress=progress)
        several = [one for layer in fresh.values() for one in layer] + list(joint.statistics if joint else ())
        return self._packed(block, several, found)

    def _packed(self, block: int, statistics: Sequence[Statistic], found: Scanned) -> bytes:
        order, names, stated = self.data.order or (), self.data.names, self.data.labels
        indices = [order[position] for position in self.store.positions(block)]
        arrays: dict[str, Tensor] = {}
        states: list[dict[str, Any]] = []
        for place, statistic in enumerate(statistics):
            state = statistic.state_dict()
            arrays |= {f"{place}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
            states.append({name: value for name, value in state.items() if not isinstance(value, Tensor)})
        rest = {
            "block": block,
            "store": self.store.digest,
            "names": names and [os.path.relpath(names[index], self.folder) for index in indices],
            "states": states,
            "indices": indices,
            "labels": list(found.labels.items()),
            "stated": stated and [stated[index] for index in indices],  # of those that cannot be read too
            "images": found.images,
            "skipped": list(found.skipped.items()),
            "shape": found.shape,
            "others": list(found.others.items()),
        }
        return packed(arrays, rest)


def merged(store: Store, statistics: Sequence[Statistic], places: Sequence[int]) -> tuple[Scanned, set[int]]:
    """Every block's states merged, in order, into statistics that have seen nothing; what was scanned, what is damaged.

    places: of the statistics' states among those of the store. Where blocks are damaged or missing, all of it lacks
    them.
    """
    total, damaged = Scanned(), set()
    for block in range(store.count):
        try:
            arrays, rest = store.read(block)
        except Damaged:
            damaged.add(block)
            continue
        for place, statistic in zip(places, statistics, strict=True):
            statistic.merge(_restored(statistic, store.statistics[place][2], state_of(place, arrays, rest)))
        total.merge(scanned(rest), rest["indices"])
    return total, damaged


def state_of(place: int, arrays: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one statistic, of all that a block holds."""
    prefix = f"{place}."
    state: dict[str, Any] = dict(rest["states"][place])
    return state | {name.removeprefix(prefix): one for name, one in arrays.items() if name.startswith(prefix)}


def _restored(like: Statistic, options: Mapping[str, Any], state: Mapping[str, Any]) -> Statistic:
    part = like.fresh() if like.options == options else type(like)(**options)
    part.load_state_dict(state)
    return part


def scanned(rest: Mapping[str, Any]) -> Scanned:
    """What the pass over one block came across."""
    return Scanned(
        images=rest["images"],
        labels=dict(rest["labels"]),
        skipped=dict(rest["skipped"]),
        shape=rest["shape"] and _shape(rest["shape"]),
        others={index: _shape(shape) for index, shape in rest["others"]},
    )


def _shape(values: Sequence[int]) -> Shape:
    channels, height, width = values
    return channels, height, width


class _Ahead:
    """Samples that are read ahead, cut where blocks end."""

    def __init__(self, parts: Iterator[list[Sample]]) -> None:
        self.parts = parts
        self.held: list[Sample] = []

    def more(self) -> bool:
        """Whether any are left."""
        self.held = self.held or next(self.parts, [])
        return bool(self.held)

    def take(self, n: int) -> Iterator[list[Sample]]:
        """The next n of them, in parts."""
        while n and self.more():
            part, self.held = self.held[:n], self.held[n:]
            n -= len(part)
            yield part


class _Fixed(Pace):
    """The batch size of a store, which no block may depart from."""

    def halve(self) -> bool:
        raise StoreError(
            f"memory ended at {self.size} images at once, the batch size of this store; make another with a smaller "
            "batch_size="
        )
