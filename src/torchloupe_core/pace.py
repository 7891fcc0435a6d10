"""How many images go through the model at once: found while working, halved where memory ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

import torch

__all__ = ["Pace", "out_of_memory"]

T = TypeVar("T")

LEAST, MOST, PIXELS = 8, 64, 8 * 224 * 224  # where to begin: at 224 pixels larger batches lose on a CPU
TRIALS = 2  # batches of each size; the first of a new shape pays for the library's preparations
WORTH = 0.97  # a larger batch is kept if an image then takes at most this share of its time
FEW = 16  # a job of fewer batches is too short to learn from


class Pace:
    """The batch size for one model and one input size.

    `run` tries larger and smaller batches on the work itself, so the search costs no forward pass, and keeps what it
    found for the next time. A size given by the user stays, unless memory ends.
    """

    def __init__(self, size: int, *, most: int = 1, settled: bool = False) -> None:
        self.size, self.most, self.settled = size, most, settled

    @classmethod
    def beginning(cls, height: int, width: int, device: torch.device) -> Pace:
        """A cautious start for images of this size."""
        size = max(LEAST, min(MOST, PIXELS // (height * width)))
        return cls(size, most=size * (4 if device.type == "cpu" else 256))

    def run(
        self, total: int, ask: Callable[[int, int], T], *, scale: int = 1
    ) -> Generator[tuple[int, int, T], None, None]:
        """`(start, stop, ask(start, stop))` for one batch after another until `total`.

        scale: items that go into one image's place, where only a part of the model runs for each. A batch too large for
        the memory is halved and asked again.
        """
        done, search = 0, _Search(self) if scale == 1 and self._worth_searching(total) else None
        try:
            while done < total:
                size = self.size
                stop = min(done + size * scale, total)
                begun = time.perf_counter()
                try:
                    answer = ask(done, stop)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error) or not self.halve():
                        raise
                    continue
                if search is not None and stop - done == size:
                    _wait()
                    search.took((time.perf_counter() - begun) / size)
                yield done, stop, answer
                done = stop
        finally:
            if search is not None:
                search.end()

    def halve(self) -> bool:
        """Half as many at once from now on; False if it was one already."""
        if self.size == 1:
            return False
        self.size, self.settled = self.size // 2, True
        return True

    def _worth_searching(self, forwards: int) -> bool:
        return not self.settled and forwards >= FEW * self.size


class _Search:
    """Climbs from half the first size upwards, by factors of two, while an image gets cheaper."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.fastest, self.best = float("inf"), pace.size
        self.times: list[float] = []
        pace.size = max(1, pace.size // 2)

    def took(self, seconds: float) -> None:
        """Notes the time of one image in a batch of the present size, and moves on when it is known well enough."""
        if self.pace.settled:
            return
        self.times.append(seconds)
        if len(self.times) < TRIALS:
            return
        cheapest, self.times = min(self.times), []
        if cheapest <= WORTH * self.fastest:
            self.fastest, self.best = cheapest, self.pace.size
            if self.best * 2 <= self.pace.most:
                self.pace.size *= 2
                return
        self.pace.size, self.pace.settled = self.best, True

    def end(self) -> None:
        """Work that ends early leaves the best size so far."""
        if not self.pace.settled:
            self.pace.size = self.best


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended, on an accelerator or on the CPU."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
