"""What keeping a scan in a store costs, and how soon a store answers, on one core.

    python benchmarks/store.py                  every row, about 5 minutes
    python benchmarks/store.py kept             the rows whose name begins so

Five layers of resnet18, all channels, at 224 pixels in batches of 8 and blocks of 64 images, the smallest that are
chosen by default; larger data sets have larger blocks, whose costs weigh less. The ratio is that of all a stored scan
does, waiting for the disk included, to its passes over the images, which are those of a scan without a store; medians
of several runs. Answers are in seconds by the clock.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Row, Rows, asked, run
from networks import BATCH, network, noise
from torch.utils.data import DataLoader, TensorDataset

import torchloupe as tl
from torchloupe_core.dataset import open_data
from torchloupe_core.filling import scan_stored
from torchloupe_core.scan import Pass, scan
from torchloupe_core.statistics import Features, Moments, Top
from torchloupe_core.store import Store
from torchloupe_core.stored import stored_features

LAYERS = ("relu", "layer1", "layer2", "layer3", "layer4")
IMAGES, ROUNDS = 192, 5
VECTORS, CHANNELS = 100_000, 512

KEPT: dict[str, Callable[[], list[Any]]] = {
    "kept: Features()": lambda: [Features()],
    "kept: Top(9)": lambda: [Top(9)],
    "kept: what torchloupe scan keeps": lambda: [Features(), Top(9), Top(9, largest=False), Moments()],
}


def kept(make: Callable[[], list[Any]]) -> Rows:
    """Processor time of all but the passes over the images, and time spent waiting for the disk, to that of the passes.

    All taken in one run, so that a machine that is busy with other things slows them alike.
    """
    handle, loader = tl.wrap(network("resnet18")), DataLoader(TensorDataset(noise(IMAGES)), BATCH)
    data, found = open_data(loader, handle.spec), []
    with watched() as spent, tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS + 1):
            spent |= {"pass": 0.0, "waiting": 0.0}
            begun = time.process_time()
            scan_stored(handle, data, {layer: make() for layer in LAYERS}, store=f"{folder}/{turn}", block_size=64)
            rest = time.process_time() - begun - spent["pass"]
            found.append((rest / spent["pass"], spent["waiting"] / spent["pass"]))
    rest, waited = map(statistics.median, zip(*found[1:], strict=True))
    yield Row("", 1 + rest + waited, "of its passes", 1.03, note=f"(of it {waited:.4f} waiting for the disk)")


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Inside, seconds spent in passes over images, of processor time, and waiting for the disk are added up."""
    write, go_through = Store.write, Pass.go_through
    spent = {"pass": 0.0, "waiting": 0.0}

    def written(self: Store, block: int, content: bytes) -> None:
        begun, busy = time.perf_counter(), time.process_time()
        write(self, block, content)
        spent["waiting"] += time.perf_counter() - begun - (time.process_time() - busy)

    def gone_through(self: Pass, *arguments: Any, **options: Any) -> None:
        begun = time.process_time()
        go_through(self, *arguments, **options)
        spent["pass"] += time.process_time() - begun

    Store.write, Pass.go_through = written, gone_through  # type: ignore[method-assign, assignment]
    try:
        yield spent
    finally:
        Store.write, Pass.go_through = write, go_through  # type: ignore[method-assign]


def by_the_clock(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def rectified(size: int) -> tl.Handle:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, CHANNELS, 1), torch.nn.ReLU()).eval()
    return tl.wrap(module, input_size=(3, size, size))


def answered() -> Rows:
    """The best nine of 512 channels out of a store of as many images as ImageNet's validation set has."""
    handle, inputs = rectified(2), torch.randn(50_000, 3, 2, 2)
    with tempfile.TemporaryDirectory() as folder:
        data = open_data(inputs, handle.spec)
        scan(handle, data, {"1": [Top(9), Features()]}, store=f"{folder}/store", batch_size=256)
        yield Row("", by_the_clock(lambda: scan(handle, data, {"1": [Top(9)]}, store=f"{folder}/store")), "s")


def read() -> Rows:
    """100,000 vectors appended to the table, and read back, checked."""
    handle, inputs = rectified(1), torch.randn(VECTORS, 3, 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        scan(handle, open_data(inputs, handle.spec), {"1": [Features()]}, store=store, batch_size=1024)
        for what in ("appended", "read back"):
            yield Row(what, by_the_clock(lambda: stored_features(store, "1")), "s")


PARTS: dict[str, Callable[[], Rows]] = {
    **{name: partial(kept, make) for name, make in KEPT.items()},
    "answered: Top(9) of 50,000 images": answered,
    f"read: {VECTORS:,} x {CHANNELS}": read,
}

if __name__ == "__main__":
    run(PARTS, asked(__doc__))
