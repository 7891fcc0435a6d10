"""Passes over training images, and solutions for test images, that last: what is stored is not computed again.

Each pass is a store in a folder of its own, with a block for each part of the images. A block is one file, written in
one rename, and says by a SHA-256 whether it is what was written. What a part comes to depends on the part alone, so it
does not matter which process did it, when, or how often: ranks of one run share the parts out, and a run that was
killed goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from torchloupe_core.blocks import Done
from torchloupe_core.borrow import kept_threads
from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput, StoreError
from torchloupe_core.filling import block_size_for, filled
from torchloupe_core.handle import Handle
from torchloupe_core.identity import of_data, of_model
from torchloupe_core.store import Store, packed

__all__ = ["KEEPING", "Lasting", "Parted", "made_by", "require_kept", "summed"]

Arrays = dict[str, Tensor]
PASSES = (
    "eigenvectors",
    "gradients",
    "moments",
    "products",
    "projections",
    "solutions",
    "spectrum",
    "squares",
    "trace",
    "train",
)
SMALLEST = 8  # images in a part at least


class Parted(Protocol):
    """What can be asked of a part of its images, as a `Problem`."""

    handle: Handle

    def within(self, part: slice) -> Any:
        """The same of some training images alone."""


P = TypeVar("P", bound=Parted)


KEEPING = frozenset({"arnoldi", "cg", "ekfac", "gradient_dot", "kfac", "lissa", "tracin", "trak"})


@dataclass(frozen=True)
class Lasting:
    """Where passes are kept, and what they are of.

    made_by: model, data, question, method: what may not differ between runs. block_size: images in a part, chosen
    unless given. spread: an engine, as Ray's, that does the parts elsewhere. place: of a checkpoint.
    """

    path: Path
    made_by: Mapping[str, Any]
    resume: bool = True
    block_size: int | None = None
    spread: Any = None
    engine: str | None = None
    report: Callable[[int, int], None] = field(default=lambda done, total: None, compare=False)
    place: str = ""

    def at(self, place: str, model: Mapping[str, Any]) -> Lasting:
        """That of a checkpoint, whose model these facts are of."""
        return replace(self, place=place, made_by={**self.made_by, **model})

    def of(self, labels: Tensor, test_labels: Tensor, indices: Tensor) -> Lasting:
        """That of data sets once they are read: their labels, and which training images there are."""
        facts = {"training labels": _digest(labels), "test labels": _digest(test_labels)}
        facts |= {"images that could be read": _digest(indices)}
        return replace(self, made_by={**self.made_by, **facts})

    def of_a_scan(self, name: str) -> dict[str, Any]:
        """How a scan keeps what it sees in a folder here."""
        return {"store": self.path / name, "engine": self.engine, "resume": self.resume}

    def once(self, name: str, problem: P, of: Callable[[P], Arrays]) -> Arrays:
        """What `of` makes of the whole problem."""
        return next(arrays for _, arrays in self.each(name, problem, 1, lambda whole, _: of(whole)))

    def each(
        self, name: str, problem: P, count: int, of: Callable[[P, slice], Arrays], size: int | None = None
    ) -> Iterator[tuple[slice, Arrays]]:
        """What `of` makes of each part of `count` images, in order.

        name: of the pass. size: images in a part.
        """
        store = self._complete(name, problem, count, of, size)
        for block in range(store.count):
            positions = store.positions(block)
            yield slice(positions.start, positions.stop), store.read_whole(block)[0]

    def _complete(self, name: str, problem: P, count: int, of: Callable[[P, slice], Arrays], size: int | None) -> Store:
        """The store of a pass, with every part in it."""
        path = self.path / f"{name}{self.place}"
        size = size or self.block_size or min(max(SMALLEST, -(-count // 4)), block_size_for(count, 1))
        return filled(
            path,
            {**self.made_by, "images": count, "pass": name},
            {"block_size": size},
            lambda store: _PartWork(problem, of, store, problem.handle),
            resume=self.resume,
            spread=self.spread,
            progress=self.report,
        )


@dataclass(frozen=True)
class _PartWork(Generic[P]):
    """What it takes to do parts in this process or, sent there, in another."""

    problem: P
    of: Callable[[P, slice], Arrays]
    store: Store
    handle: Handle
    workers: int | None = None

    def run(
        self, blocks: Iterable[int], done: Done, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Does parts one after the other and hands each over as the bytes that are stored."""
        with self.handle.borrow(), kept_threads(self.store.computing["threads"]):
            for block in blocks:
                positions = self.store.positions(block)
                arrays = self.of(self.problem, slice(positions.start, positions.stop))
                done(block, packed(arrays, {"block": block, "store": self.store.digest}))


def made_by(
    handle: Handle, train: DataSet, test: DataSet, question: Mapping[str, Any], checkpoints: Sequence[Handle]
) -> dict[str, Any]:
    """What passes are of: model, data and all that is asked. Raises `BadInput` for a stream."""
    of_tests = {f"test {name}": value for name, value in of_data(test).items()}
    weights = [of_model(one)["weights"] for one in checkpoints]
    facts = of_model(handle) | of_data(train) | of_tests | {name: str(value) for name, value in question.items()}
    found: dict[str, Any] = json.loads(json.dumps(facts | {"weights of checkpoints": weights}))
    return found


def require_kept(method: str, head: str | None, store: Path) -> None:
    """Raises `BadInput` where nothing would be kept, `StoreError` where something else is in the folder."""
    if head != "alone" and method not in KEEPING:
        raise BadInput(
            f"{method!r} keeps no passes through layers; leave out store= and engine=, or take one of "
            f"{', '.join(sorted(KEEPING))}"
        )
    _require_folder(store)


def _require_folder(path: Path) -> None:
    """Raises `StoreError`, before any work, where something else is in the way of passes that last."""
    try:
        others = [one.name for one in path.iterdir() if not one.name.startswith(PASSES)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be a store: {error.strerror}") from error
    if others:
        raise StoreError(f"{path} keeps no influence, but {others[0]!r} is in it; name an empty or a new folder")


def summed(parts: Iterable[tuple[slice, Arrays]], n: int) -> Arrays:
    """The mean over images of what each part gave as a mean over its own."""
    total: Arrays = {}
    for part, arrays in parts:
        share = (part.stop - part.start) / n
        for name, array in arrays.items():
            total[name] = total[name] + share * array if name in total else share * array
    return total


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
