"""How much memory is there, so that what would not fit is refused before it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from torchloupe_core.errors import BadInput

__all__ = ["available", "most_held", "require"]


def available(device: torch.device) -> int | None:
    """Free bytes on a device, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [found for found in (_machine(), _group()) if found is not None]
    return min(free, default=None)


def require(needed: float, what: str, device: torch.device, instead: str = "") -> None:
    """Raises `BadInput` if `what` takes more bytes than are free on the device."""
    free = available(device)
    if free is not None and needed > free:
        way_out = f"; {instead}" if instead else ""
        raise BadInput(
            f"{what} takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free on {device}{way_out}"
        )


def most_held(work: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes of tensors held at once that `work` made, None where the device does not tell.

    On the CPU torch's profiler, which writes lines of its own to the standard error, adds up what is taken and given.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _machine() -> int | None:
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None


def _group() -> int | None:
    """Of a container, where it has a limit of its own."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        most = int((folder / "memory.max").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return most - int((folder / "memory.current").read_text()) + cached
    return None
