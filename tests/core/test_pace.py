"""The batch size: found while working, halved where memory ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from torchloupe_core import pace as pacing
from torchloupe_core.pace import Pace, out_of_memory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that moves only when told."""
    now = [0.0]
    monkeypatch.setattr(pacing.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def sizes(pace: Pace, total: int, passes: Callable[[float], None], cost: Callable[[int], float]) -> list[int]:
    """The batches of a job whose batch of n takes `cost(n)` seconds."""
    return [stop - start for start, stop, _ in pace.run(total, lambda start, stop: passes(cost(stop - start)))]


def test_it_climbs_while_an_image_gets_cheaper(clock: Callable[[float], None]) -> None:
    pace = Pace(8, most=1000)
    batches = sizes(pace, 400, clock, lambda n: 1 + 0.01 * n if n <= 32 else 0.1 * n)
    assert batches == [4, 4, 8, 8, 16, 16, 32, 32, 64, 64, 32, 32, 32, 32, 24]
    assert pace.size == 32 and pace.settled
    assert sizes(pace, 100, clock, lambda n: 1.0) == [32, 32, 32, 4]


def test_it_goes_down_where_large_batches_lose(clock: Callable[[float], None]) -> None:
    pace = Pace(8, most=1000)
    assert sizes(pace, 128, clock, lambda n: n**1.5)[:6] == [4, 4, 8, 8, 4, 4]


def test_it_stops_at_the_most(clock: Callable[[float], None]) -> None:
    pace = Pace(8, most=32)
    assert max(sizes(pace, 4000, clock, lambda n: 1.0)) == 32
    assert pace.settled


@pytest.mark.parametrize("pace", [Pace(8, most=100, settled=True), Pace(8, most=100)])
def test_a_size_given_or_a_short_job_is_not_searched(pace: Pace, clock: Callable[[float], None]) -> None:
    assert set(sizes(pace, 120, clock, lambda n: 1.0)) == {8}


def test_work_that_ends_early_keeps_the_best_so_far(clock: Callable[[float], None]) -> None:
    pace = Pace(8, most=100)
    running = pace.run(4000, lambda start, stop: clock(1.0))
    for _ in range(5):
        next(running)
    assert pace.size == 16
    running.close()
    assert pace.size == 8 and not pace.settled


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(error: BaseException) -> None:
    assert out_of_memory(error)
    pace, seen = Pace(8), []

    def ask(start: int, stop: int) -> list[int]:
        seen.append(stop - start)
        if stop - start > 2:
            raise error
        return list(range(start, stop))

    assert [one for _, _, found in pace.run(11, ask) for one in found] == list(range(11))
    assert seen == [8, 4, 2, 2, 2, 2, 2, 1] and pace.size == 2


def test_an_image_that_does_not_fit_alone_is_an_error() -> None:
    def ask(start: int, stop: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(Pace(8).run(3, ask))
    with pytest.raises(RuntimeError, match="else"):
        list(Pace(8).run(3, lambda start, stop: (_ for _ in ()).throw(RuntimeError("something else"))))
