"""Scans of a tiny model into stores, and processes that do them and die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.dataset import open_data
from torchloupe_core.filling import scan_stored
from torchloupe_core.handle import Handle
from torchloupe_core.scan import Scanned
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.statistics import Features, Histogram, Moments, Quantiles, Sampled, Statistic, Top

IMAGES = 150

Statistics = Mapping[str, list[Any]]


def model() -> Handle:
    handle, _ = SPECIMENS["plain"]()
    handle.trace()
    return handle


def inputs(n: int = IMAGES) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def several() -> dict[str, list[Any]]:
    """Every statistic, some of whose sums depend on the order of what is added."""
    moments: list[Statistic] = [Moments(covariance=True), Histogram(64), Quantiles(32)]
    return {"relu1": [Top(4), *moments, Features()], "fc.in": [Top(3, largest=False, per_image=2), Sampled(20)]}


def scanned(path: Path | None, handle: Handle, data: Any, **options: Any) -> tuple[Statistics, Scanned]:
    """A scan of all that in blocks of 8 and batches of 4, kept in a folder or for the moment."""
    statistics = several()
    how: Any = {"batch_size": 4, "block_size": 8, **options}
    return statistics, scan_stored(handle, open_data(data, handle.spec), statistics, store=path, **how)


def states(statistics: Statistics) -> dict[str, Any]:
    """What they hold, by name."""
    return {
        f"{layer} {place} {name}": value
        for layer, several in statistics.items()
        for place, one in enumerate(several)
        for name, value in one.state_dict().items()
    }


def require_same(found: Statistics, expected: Statistics) -> None:
    """Equal to the last bit."""
    require_alike(states(found), states(expected))


def require_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        alike = torch.equal(one[name], other[name]) if isinstance(one[name], Tensor) else one[name] == other[name]
        assert alike, name


def blocks(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted((path / "blocks").glob("*.npz"))}


def forked(work: Callable[[], object], **environment: str) -> int:
    """The process id of a child that does the work and ends, with 0 or else 1."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ.update(environment)
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """How a child ended: its exit code, or less than 0 for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int) -> int:
    os.kill(child, signal.SIGKILL)
    return ended(child)
