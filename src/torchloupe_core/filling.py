"""A scan that lasts: what is stored of it is not done again, and several processes may do it together."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from torchloupe_core import registry
from torchloupe_core.blocks import Done, Work, merged
from torchloupe_core.dataset import DataSet, class_names
from torchloupe_core.errors import BadInput, NotApplicable, StoreError
from torchloupe_core.handle import Handle
from torchloupe_core.identity import common_folder, differences, of_data, of_model, of_question, places
from torchloupe_core.pace import FEW
from torchloupe_core.scan import Joint, Report, Scanned, beginning, computing, require_images
from torchloupe_core.statistics import Statistic
from torchloupe_core.store import LOCK, Damaged, Store, is_store, require_free
from torchloupe_core.writers import Crew, Writer

__all__ = ["Blockwise", "block_size_for", "filled", "scan_stored"]

T = TypeVar("T")

POLL = 0.1  # seconds between looks at what other ranks have done
PATIENCE = 60.0  # seconds without a block from any rank, at least, before one does what another has taken
SLOWER = 5.0  # and so many times this rank's slowest block
FEWEST, MOST, BLOCKS = 64, 1024, 64  # images in a block; blocks in a data set that is neither small nor large
WORTH = 2048  # a data set of so many first batches is worth a search for the best batch size


def scan_stored(
    handle: Handle,
    data: DataSet,
    statistics: Mapping[str, Sequence[Statistic]],
    *,
    joint: Joint | None = None,
    store: str | PathLike[str] | None = None,
    resume: bool = True,
    engine: str | None = None,
    block_size: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: Report = lambda done, total: None,
) -> Scanned:
    """The same as `scan`, block by block, kept in the folder `store`, or meanwhile in a temporary one.

    resume: go on with a store that holds blocks; one made by anything else is refused. engine: who does the blocks, as
    "ray"; else this process does, or the ranks of its run under `torchrun`, each of which gets the whole answer.
    block_size: images in a block. It and batch_size are chosen once for a store, unless given. Raises `StoreError`.
    """
    begun, crew = time.perf_counter(), Crew() if store is None else Crew.present()
    if engine is not None and crew.size > 1:
        raise BadInput(f"engine={engine!r} spreads a scan by itself; leave it out under torchrun")
    spread = None if engine is None else registry.find("engine", engine).run
    made_by = json.loads(
        json.dumps(of_model(handle) | of_question(statistics, joint, autocast) | of_data(data))  # tuples become lists
    )
    several = [one for layer in statistics.values() for one in layer] + list(joint.statistics if joint else ())
    with contextlib.ExitStack() as held:
        path = Path(held.enter_context(tempfile.TemporaryDirectory()) if store is None else store)
        require_free(path)
        given = _given(handle, data, batch_size, block_size)
        found = _looked_up(path, made_by, several) if resume else None
        if found is None:
            writer = held.enter_context(Writer(path / LOCK, crew))

            def choose() -> tuple[dict[str, int], dict[str, Any]]:
                threads = torch.get_num_threads() if spread is None else 1
                chosen = _chosen(handle, data, list(statistics), autocast, given)
                return chosen | {"threads": threads}, _about(handle, data, joint)

            opened = _opened(path, writer, made_by, given, choose, resume)
            work = Work(handle, data, statistics, joint, opened, _folder(data), workers, autocast, skip_failures)
            found = _Filling(work, writer, progress, spread).complete(lambda: _into(opened, several))
    found.seconds = time.perf_counter() - begun
    if found.skipped and not skip_failures:
        index, why = next(iter(found.skipped.items()))
        raise BadInput(why if data.name(index) in why else f"{data.name(index)}: {why}")
    require_images(found)
    return found


def _looked_up(path: Path, made_by: Mapping[str, Any], statistics: Sequence[Statistic]) -> Scanned | None:
    """The answer out of a store that is complete and holds at least what is asked; None if there is work to do.

    Another device may ask then, and files that were copied are the same by name and size.
    """
    if not is_store(path) or (store := Store.open(path)).missing():
        return None
    kept = {name: store.made_by.get(name) for name in ("device", "times of change") if name in store.made_by}
    found = places(made_by["statistics"], store.made_by["statistics"])
    if found is None or differences({**made_by, **kept, "statistics": store.made_by["statistics"]}, store.made_by):
        return None
    fresh = [one.fresh() for one in statistics]
    scanned, damaged = merged(store, fresh, found)
    if damaged:
        return None
    for statistic, one in zip(statistics, fresh, strict=True):
        statistic.merge(one)
    return scanned


def filled(
    path: Path,
    made_by: Mapping[str, Any],
    computing: Mapping[str, int],
    work: Callable[[Store], Blockwise],
    *,
    resume: bool = True,
    spread: Any = None,
    crew: Crew | None = None,
    progress: Report = lambda done, total: None,
) -> Store:
    """The store in a folder, with every block in it: those that are missing or damaged are done by `work` of the store.

    computing: how a new store is computed, besides the threads. A store that is complete is not written into. Raises
    `StoreError` for one that was made by anything else.
    """
    require_free(path)
    if resume and is_store(path) and not (store := Store.open(path)).missing():
        _require_same(store, made_by, {})
        if not store.damaged():
            return store
    threads = torch.get_num_threads() if spread is None else 1
    with Writer(path / LOCK, crew or Crew.present()) as writer:
        store = _opened(path, writer, made_by, {}, lambda: ({**computing, "threads": threads}, {}), resume)
        _Filling(work(store), writer, progress, spread).complete(lambda: (None, store.damaged()))
    return store


def _opened(
    path: Path,
    writer: Writer,
    made_by: Mapping[str, Any],
    given: Mapping[str, int],
    choose: Callable[[], tuple[dict[str, int], dict[str, Any]]],
    resume: bool,
) -> Store:
    """The store to go on with, or a new one, computed as is chosen then. One that holds no block yet is nothing yet."""
    if writer.first and is_store(path) and not Store.open(path).present():
        Store.open(path).discard()
    if not is_store(path):
        Store.make(path, made_by, *choose())
    store = Store.open(path)
    _require_same(store, made_by, given)
    _require_new(store, resume or not writer.first)
    if writer.alone:
        store.tidy()
    return store


class Blockwise(Protocol):
    """Work that is done block by block, as `Work`."""

    @property
    def store(self) -> Store: ...
    def run(self, blocks: Iterable[int], done: Done, progress: Report) -> None: ...


class _Filling:
    """The blocks of a store done, until none is missing."""

    def __init__(self, work: Blockwise, writer: Writer, progress: Report, spread: Any) -> None:
        self.work, self.store, self.writer, self.progress, self.spread = work, work.store, writer, progress, spread
        self.damaged: set[int] = set()
        self.written: Counter[int] = Counter()
        self.slowest = 0.0

    def complete(self, merge: Callable[[], tuple[T, set[int]]]) -> T:
        """Does what is missing or damaged until `merge` finds nothing damaged, and gives what it merged."""
        while True:
            self._fill()
            found, self.damaged = merge()
            if not self.damaged:
                return found
            self._require_lasting()

    def _fill(self) -> None:
        """Own blocks first, then those no living rank is at; in the end, after some patience, any that are missing."""
        since, left = time.monotonic(), -1
        while missing := sorted({*self.store.missing(), *self.damaged}):
            if len(missing) != left:
                since, left = time.monotonic(), len(missing)
            patience = max(PATIENCE, SLOWER * self.slowest)
            if not self._do(missing, bold=time.monotonic() - since > patience):
                time.sleep(POLL)

    def _do(self, missing: Sequence[int], *, bold: bool) -> bool:
        """Does those of the missing blocks that no other rank is at, or all if it is bold; whether there were any."""
        crew, begun, taken = self.writer.crew, [time.monotonic()], set[int]()
        order = sorted(missing, key=lambda block: block % crew.size != crew.rank)
        finished = sum(len(self.store.positions(block)) for block in self.store.present() - self.damaged)

        def offered() -> Iterator[int]:
            for block in order:
                if self.writer.take(block) or bold:
                    taken.add(block)
                    if self._needed(block):
                        yield block

        def done(block: int, content: bytes) -> None:
            nonlocal finished
            self.store.write(block, content)
            self.writer.leave(block)
            self.damaged.discard(block)
            self.written[block] += 1
            finished += len(self.store.positions(block))
            self.slowest = max(self.slowest, time.monotonic() - begun[-1])
            begun.append(time.monotonic())

        def report(within: int, total: int) -> None:
            self.progress(finished + within, int(self.store.made_by["images"]))

        try:
            self._run(offered(), done, report)
        finally:
            for block in taken:
                self.writer.leave(block)
        return len(begun) > 1

    def _run(self, blocks: Iterator[int], done: Done, report: Report) -> None:
        if self.spread is None:
            self.work.run(blocks, done, report)
        else:
            self.spread(self.work, list(blocks), done, report)

    def _needed(self, block: int) -> bool:
        """Whether a block is missing or damaged still: another rank may have done it meanwhile."""
        try:
            if block in self.damaged or block not in self.store.present():
                self.store.read(block)
        except Damaged:
            return True
        self.damaged.discard(block)
        return False

    def _require_lasting(self) -> None:
        twice = [block for block in self.damaged if self.written[block] > 1]
        if twice:
            raise StoreError(f"{self.store.path} does not keep what is written: block {twice[0]} was damaged twice")


def _into(store: Store, statistics: Sequence[Statistic]) -> tuple[Scanned, set[int]]:
    """All blocks merged into the statistics, unless some are damaged."""
    fresh = [one.fresh() for one in statistics]
    found, damaged = merged(store, fresh, range(len(fresh)))
    for statistic, one in zip(statistics, fresh, strict=True) if not damaged else ():
        statistic.merge(one)
    return found, damaged


def block_size_for(images: int, batch: int) -> int:
    """How many images make a block, in whole batches."""
    least = min(MOST, max(FEWEST, images // BLOCKS))
    return -(-least // batch) * batch


def _given(handle: Handle, data: DataSet, batch_size: int | None, block_size: int | None) -> dict[str, int]:
    """What the caller or a loader says of how to compute."""
    if block_size is not None and block_size < 1:
        raise BadInput(f"block_size is at least 1; got {block_size}")
    given = {} if block_size is None else {"block_size": block_size}
    if batch_size is not None or data.batch_size is not None:
        given["batch_size"] = beginning(handle, data, batch_size).size
    return given


def _chosen(
    handle: Handle, data: DataSet, layers: Sequence[str], autocast: torch.dtype | None, given: Mapping[str, int]
) -> dict[str, int]:
    """The batch size given or the one known to be fast, and blocks of whole batches."""
    pace, images = beginning(handle, data, given.get("batch_size")), len(data)
    if not pace.settled and images >= WORTH * pace.size and layers and handle.spec.input_size is not None:
        _search(handle, layers, autocast)
    return {"batch_size": pace.size, "block_size": block_size_for(images, pace.size), **given}


def _search(handle: Handle, layers: Sequence[str], autocast: torch.dtype | None) -> None:
    """Finds the best batch size on noise, once: it may not change when blocks are there."""
    shape = handle.input_shape
    pace, noise = handle.pace(shape), torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    noise = noise.to(handle.device, handle.dtype)

    def ask(start: int, stop: int) -> None:
        with handle.watch(*layers, shape=shape) as watch:
            watch(noise.expand(stop - start, -1, -1, -1).contiguous())

    with handle.borrow(), computing(handle, autocast), contextlib.closing(pace.run(FEW * pace.most, ask)) as tries:
        next((True for _ in tries if pace.settled), None)


def _about(handle: Handle, data: DataSet, joint: Joint | None) -> dict[str, Any]:
    embedding = None
    with contextlib.suppress(NotApplicable, BadInput):  # not every model has one
        embedding = handle.embedding
    return {
        "embedding": embedding,
        "folder": _folder(data),
        "classes": class_names(data),
        "targets": [] if joint is None else list(map(str, joint.targets)),
        "torch": torch.__version__,
    }


def _folder(data: DataSet) -> str | None:
    names, order = data.names, data.order
    return None if names is None or order is None else str(common_folder([names[index] for index in order]))


def _require_same(store: Store, made_by: Mapping[str, Any], given: Mapping[str, int]) -> None:
    computed = {name: store.computing[name] for name in given}
    found = [*differences(made_by, store.made_by), *differences(given, computed)]
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise StoreError(
            f"{store.path} was made by another question; name another store, or ask as it was asked:{lines}"
        )


def _require_new(store: Store, resume: bool) -> None:
    if not resume and (present := store.present()):
        raise StoreError(
            f"{store.path} holds {len(present)} of {store.count} blocks already; resume=True goes on from there"
        )
