"""What keeping a scan in a store costs, and how soon a store answers, on one core.

    python benchmarks/store.py                  every row, about 5 minutes
    python benchmarks/store.py kept             the rows whose name begins so

Five layers of resnet18, all channels, at 224 pixels in batches of 8 and blocks of 64 images, the smallest that are
chosen by default; larger data sets have larger blocks, whose costs weigh less. The ratio is that of all a stored scan
does, waiting for the disk included, to its passes over the images, which are those of a scan without a store.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from explain import BATCH, _asked, _images, _model, _report
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
    print(f"torch {torch.__version__}, one core; medians of a stored scan / its passes over the images\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in KEPT.items():
            if _asked(name, arguments.names):
                rest, waited = _overhead(make, Path(folder))
                _report(name, 1 + rest + waited, 1.03, f"(of it {waited:.4f} waiting for the disk)")
        if _asked("answered", arguments.names):
            _answered(Path(folder))
        if _asked("read", arguments.names):
            _read(Path(folder))


def _overhead(make: Callable[[], list[Any]], folder: Path) -> tuple[float, float]:
    """Processor time of all but the passes over the images, and time spent waiting for the disk, to that of the passes.

    All taken in one run, so that a machine that is busy with other things slows them alike; medians of several runs.
    """
    handle, loader = tl.wrap(_model("resnet18")), DataLoader(TensorDataset(_images(IMAGES)), BATCH)
    data, write, go_through = open_data(loader, handle.spec), Store.write, Pass.go_through
    spent = {"pass": 0.0, "waiting": 0.0}

    def written(self: Store, block: int, content: bytes) -> None:
        begun, busy = time.perf_counter(), time.process_time()
        write(self, block, content)
        spent["waiting"] += time.perf_counter() - begun - (time.process_time() - busy)

    def gone_through(self: Pass, *arguments: Any, **options: Any) -> None:
        begun = time.process_time()
        go_through(self, *arguments, **options)
        spent["pass"] += time.process_time() - begun

    found = []
    Store.write, Pass.go_through = written, gone_through  # type: ignore[method-assign, assignment]
    try:
        for turn in range(ROUNDS + 1):
            spent |= {"pass": 0.0, "waiting": 0.0}
            store = folder / f"{id(make)}-{turn}"
            begun = time.process_time()
            scan_stored(handle, data, {layer: make() for layer in LAYERS}, store=store, block_size=64)
            rest = time.process_time() - begun - spent["pass"]
            found.append((rest / spent["pass"], spent["waiting"] / spent["pass"]))
    finally:
        Store.write, Pass.go_through = write, go_through  # type: ignore[method-assign]
    rests, waits = zip(*found[1:], strict=True)
    return statistics.median(rests), statistics.median(waits)


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
