"""What keeping a scan in a store costs, and how soon a store answers, on one core.

    python benchmarks/store.py                  every row, about 10 minutes
    python benchmarks/store.py kept             the rows whose name begins so

Five layers of resnet18, all channels, at 224 pixels in batches of 8 and blocks of 64 images, the smallest that are
chosen by default; larger data sets have larger blocks, whose costs weigh less. Ratios are those of a scan with a store
to one without, over the same loader, as in `explain.py`; waiting for the disk, which takes no processor time, is given
as a share beside them and counted in.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from explain import BATCH, Work, _asked, _images, _model, _report, _seconds
from torch.utils.data import DataLoader, TensorDataset

import torchloupe as tl
from torchloupe_core.dataset import open_data
from torchloupe_core.filling import scan_stored
from torchloupe_core.scan import scan
from torchloupe_core.statistics import Features, Moments, Top
from torchloupe_core.store import Store
from torchloupe_core.stored import stored_features

LAYERS = ("relu", "layer1", "layer2", "layer3", "layer4")
IMAGES, ROUNDS = 192, 5
ROWS, CHANNELS = 100_000, 512

KEPT: dict[str, Callable[[], list[Any]]] = {
    "kept: Features()": lambda: [Features()],
    "kept: Top(9)": lambda: [Top(9)],
    "kept: what torchloupe scan keeps": lambda: [Features(), Top(9), Top(9, largest=False), Moments()],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of row names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one core; medians of scan with a store / scan without\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in KEPT.items():
            if _asked(name, arguments.names):
                ratio, waited = _overhead(make, Path(folder))
                _report(name, ratio + waited, 1.03, f"(of it {waited:.4f} waiting for the disk)")
        if _asked("answered", arguments.names):
            _answered(Path(folder))
        if _asked("read", arguments.names):
            _read(Path(folder))


def _overhead(make: Callable[[], list[Any]], folder: Path) -> tuple[float, float]:
    """The median ratio of processor times, and of the time spent waiting for the disk to that of the scan."""
    handle, loader = tl.wrap(_model("resnet18")), DataLoader(TensorDataset(_images(IMAGES)), BATCH)
    data, stores, waits = open_data(loader, handle.spec), itertools.count(), []  # type: Any, Any, list[float]
    write = Store.write

    def timed(self: Store, block: int, content: bytes) -> None:
        begun, busy = time.perf_counter(), time.process_time()
        write(self, block, content)
        waits[-1] += time.perf_counter() - begun - (time.process_time() - busy)

    def kept() -> object:
        waits.append(0.0)
        store = folder / f"{id(make)}-{next(stores)}"
        return scan_stored(handle, data, {layer: make() for layer in LAYERS}, store=store, block_size=64)

    def bare() -> object:
        return scan(handle, data, {layer: make() for layer in LAYERS})

    Store.write = timed  # type: ignore[method-assign]
    try:
        bare(), kept()
        ratios, shares = [], []
        for turn in range(ROUNDS):
            order: tuple[Work, Work] = (kept, bare) if turn % 2 else (bare, kept)
            times = {work: _seconds(work) for work in order}
            ratios.append(times[kept] / times[bare])
            shares.append(waits[-1] / times[bare])
    finally:
        Store.write = write  # type: ignore[method-assign]
    return statistics.median(ratios), statistics.median(shares)


def _answered(folder: Path) -> None:
    """Seconds for the best nine of 512 channels out of a store of as many images as ImageNet's validation set has."""
    handle = tl.wrap(torch.nn.Sequential(torch.nn.Conv2d(3, CHANNELS, 1), torch.nn.ReLU()).eval(), input_size=(3, 2, 2))
    inputs = torch.randn(50_000, 3, 2, 2)
    scan(handle, open_data(inputs, handle.spec), {"1": [Top(9), Features()]}, store=folder / "answered", batch_size=256)
    begun = time.perf_counter()
    scan(handle, open_data(inputs, handle.spec), {"1": [Top(9)]}, store=folder / "answered")
    print(f"{'answered: Top(9) of 50,000 images, seconds':44} {time.perf_counter() - begun:7.3f}")


def _read(folder: Path) -> None:
    """Seconds to append 100,000 vectors to the table, and to read them back, checked."""
    handle = tl.wrap(torch.nn.Sequential(torch.nn.Conv2d(3, CHANNELS, 1), torch.nn.ReLU()).eval(), input_size=(3, 1, 1))
    inputs = torch.randn(ROWS, 3, 1, 1)
    scan(handle, open_data(inputs, handle.spec), {"1": [Features()]}, store=folder / "read", batch_size=1024)
    for what in ("appended", "read back"):
        begun = time.perf_counter()
        stored_features(folder / "read", "1")
        print(f"{f'read: 100,000 x 512 {what}, seconds':44} {time.perf_counter() - begun:7.3f}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
