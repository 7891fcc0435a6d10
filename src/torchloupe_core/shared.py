"""Work that several methods of a comparison have in common, done once for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchloupe_core.handle import Handle

__all__ = ["Cost", "Shared"]

T = TypeVar("T")

ROOM = 2**30  # bytes that are kept at most


@dataclass
class Cost:
    """Seconds, and images sent forward through the model and backward."""

    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def add(self, other: Cost) -> None:
        self.seconds += other.seconds
        self.forwards += other.forwards
        self.backwards += other.backwards


@dataclass
class Shared:
    """What was done so far. `spared`: what a method that found something done would have paid for it."""

    spared: Cost = field(default_factory=Cost)
    _done: dict[Hashable, list[tuple[Tensor, Any, Cost]]] = field(default_factory=dict)
    _bytes: int = 0

    def begin(self) -> Cost:
        """What the method that begins now is spared from here on."""
        self.spared = Cost()
        return self.spared

    def once(self, handle: Handle, what: Hashable, inputs: Tensor, do: Callable[[], T]) -> T:
        """What `do` gives, which depends on the model, on `what` and on `inputs` alone. It must not be written to."""
        known = self._done.setdefault((handle, what), [])
        for before, found, cost in known:
            if before.shape == inputs.shape and torch.equal(before, inputs):
                self.spared.add(cost)
                done: T = found
                return done
        begun, forwards, backwards = time.perf_counter(), handle.forwards, handle.backwards
        done = do()
        cost = Cost(time.perf_counter() - begun, handle.forwards - forwards, handle.backwards - backwards)
        size = _bytes((inputs, done))
        if self._bytes + size <= ROOM:
            self._bytes += size
            known.append((inputs.detach(), done, cost))
        return done


def _bytes(found: Any) -> int:
    if isinstance(found, Tensor):
        return found.untyped_storage().nbytes()
    return sum(map(_bytes, found)) if isinstance(found, (list, tuple)) else 0
