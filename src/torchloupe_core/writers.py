"""Who writes into a store: one process, or the ranks of one run, which share the blocks out between them.

Locks on ranges of bytes of one file say so. They end with the process that holds them, however it ends, and no child
inherits one, as would a worker that reads images and outlives its parent for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from torchloupe_core.errors import BadInput, StoreError

__all__ = ["Crew", "Writer"]

BLOCKS_FROM = 2**32  # byte of the first block's lock; far beyond the text
SECONDS = 5.0  # for a rank that has just come to say which run it is of

_HELD: set[tuple[int, Path]] = set()  # a process does not hinder itself by such locks
_HELD_LOCK = threading.Lock()


@dataclass(frozen=True)
class Crew:
    """The processes that do one scan together. run: a name they have in common, and no other run has."""

    rank: int = 0
    size: int = 1
    run: str = ""

    @classmethod
    def present(cls) -> Crew:
        """The process group, if one is initialised; else what `torchrun` and its like state in the environment."""
        facts = os.environ
        names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT")
        run = " ".join(f"{name}={facts[name]}" for name in names if name in facts)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), run)
        if "RANK" not in facts or "WORLD_SIZE" not in facts:
            return cls()
        try:
            rank, size = int(facts["RANK"]), int(facts["WORLD_SIZE"])
        except ValueError:
            rank, size = -1, 0
        if not 0 <= rank < size:
            raise BadInput(f"RANK and WORLD_SIZE make no sense: {facts['RANK']!r} and {facts['WORLD_SIZE']!r}")
        return cls(rank, size, run)


class Writer:
    """The right to write into a store, for as long as its `with` block lasts. Raises `StoreError` if others have it."""

    def __init__(self, path: Path, crew: Crew) -> None:
        self.path, self.crew, self.key = path, crew, (os.getpid(), path.resolve())
        self.file = -1
        self.first = False  # whether it found nobody there

    def __enter__(self) -> Writer:
        with _HELD_LOCK:
            if self.key in _HELD:
                raise StoreError(f"{self.path.parent} is being written by this process already")
            _HELD.add(self.key)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self._join()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise StoreError(f"cannot write into {self.path.parent}: {error.strerror or error}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
        with _HELD_LOCK:
            _HELD.discard(self.key)

    @property
    def alone(self) -> bool:
        """Whether no other process may write meanwhile."""
        return self.crew.size == 1

    def take(self, block: int) -> bool:
        """Takes a block, unless another rank that is alive has it."""
        return self._lock(_fcntl().LOCK_EX, BLOCKS_FROM + block)

    def leave(self, block: int) -> None:
        """Gives a block free."""
        _fcntl().lockf(self.file, _fcntl().LOCK_UN, 1, BLOCKS_FROM + block)

    @contextlib.contextmanager
    def alone_at(self, place: int) -> Iterator[None]:
        """Inside, no other rank is at that place; waits until it has left. Places count down from -1."""
        _fcntl().lockf(self.file, _fcntl().LOCK_EX, 1, BLOCKS_FROM + place)
        try:
            yield
        finally:
            self.leave(place)

    def _join(self) -> None:
        """The first to come says which run it is of; the other ranks of that run may come in."""
        deadline = time.monotonic() + SECONDS
        while True:
            if self._lock(_fcntl().LOCK_EX, 0):
                self._say()
                self.first = True
                if self.alone or self._lock(_fcntl().LOCK_SH, 0):
                    return
            elif not self.alone and self._lock(_fcntl().LOCK_SH, 0):
                if self._said().get("run") == self.crew.run:
                    return
                break
            elif self.alone or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        said = self._said()
        who = f"process {said['pid']} on {said['host']}" if {"pid", "host"} <= said.keys() else "another process"
        raise StoreError(f"{self.path.parent} is in use: {who} writes into it; wait for it, or name another store")

    def _lock(self, how: int, place: int) -> bool:
        try:
            _fcntl().lockf(self.file, how | _fcntl().LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):  # one or the other, as systems differ
            return False
        return True

    def _say(self) -> None:
        text = json.dumps({"run": self.crew.run, "pid": os.getpid(), "host": socket.gethostname()})
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, text.encode(), 0)

    def _said(self) -> dict[str, object]:
        with contextlib.suppress(ValueError):
            found = json.loads(os.pread(self.file, 4096, 0))
            if isinstance(found, dict):
                return found
        return {}


def _fcntl() -> ModuleType:
    try:
        import fcntl
    except ImportError as error:
        raise StoreError("stores need a system that locks ranges of files, as Linux and macOS do") from error
    return fcntl
