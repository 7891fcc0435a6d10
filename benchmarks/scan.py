"""What a pass over a data set costs beyond the bare forward passes over the same loader, on one core.

    python benchmarks/scan.py                  every row, about 10 minutes
    python benchmarks/scan.py Top Moments      the rows whose name begins so

Five layers of resnet18, all channels, at 224 pixels in batches of 8; 96 images are few, so that most of them still
come among the best nine. Ratios and memory are measured as in `explain.py`. Receptive fields are timed for the last
layer with a map of every convolutional network of torchvision's, at 224 pixels; that finds them for all its layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from explain import BATCH, Row, Work, _asked, _grown, _images, _model, _ratio, _report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torchloupe as tl
from torchloupe_core.dataset import open_data
from torchloupe_core.receptive import fields
from torchloupe_core.scan import scan
from torchloupe_core.statistics import Features, Histogram, Moments, Quantiles, Sampled, Top

LAYERS = ("relu", "layer1", "layer2", "layer3", "layer4")
IMAGES = 96
SLOW_TO_MAKE = ("googlenet", "inception_v3")  # unless told to leave their weights alone

STATISTICS: dict[str, tuple[float, Callable[[], list[Any]]]] = {
    "nothing": (1.05, lambda: []),
    "Top(9)": (1.05, lambda: [Top(9)]),
    "Top(9, largest=False)": (1.05, lambda: [Top(9, largest=False)]),
    "Top(9, per_image=5)": (1.1, lambda: [Top(9, per_image=5)]),
    "Sampled(2048)": (1.05, lambda: [Sampled(2048)]),
    "Features()": (1.05, lambda: [Features()]),
    "Moments()": (1.1, lambda: [Moments()]),
    "Moments(covariance=True)": (1.25, lambda: [Moments(covariance=True)]),
    "Histogram()": (1.25, lambda: [Histogram()]),
    "Quantiles()": (1.3, lambda: [Quantiles()]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of row names")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)  # one measurement in this fresh process
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(json.dumps(_grown(_tiny(arguments.memory))))
        return
    print(f"torch {torch.__version__}, one core; medians of scan / bare forward passes over the same loader\n")
    for name, (goal, make) in STATISTICS.items():
        if _asked(name, arguments.names):
            ratio, low, high = _ratio(Row(name, goal, "", lambda make=make: _pair(make)))
            _report(name, ratio, goal, f"({low:.3f} to {high:.3f})")
    if _asked("receptive fields", arguments.names):
        seconds, slowest, count = _slowest_fields()
        print(f"{f'receptive fields, slowest of {count} networks':58s} {seconds:.2f} s (goal 5), {slowest}")
    if _asked("memory", arguments.names):
        few, many = _fresh(1_000), _fresh(50_000)
        _report("memory, 50,000 images against 1,000", many / few, 1.1, f"{many / 2**20:.1f}, {few / 2**20:.1f} MiB")


def _slowest_fields() -> tuple[float, str, int]:
    """Seconds for the receptive fields of the slowest network, its name, and how many there are."""
    names = torchvision.models.list_models(module=torchvision.models)
    names = [name for name in names if not name.startswith(("vit_", "swin_", "maxvit_"))]
    seconds = {}
    for name in names:
        options = {"init_weights": False} if name in SLOW_TO_MAKE else {}
        with torch.device("cpu" if name.startswith("regnet") else "meta"):  # a regnet works its widths out in tensors
            module = torchvision.models.get_model(name, weights=None, **options)
        module = module.to_empty(device="cpu").eval()
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.detach().zero_()
        handle = tl.wrap(module)
        layer = [one.name for one in handle.layers.values() if one.spatial][-1]
        begun = time.process_time()
        fields(handle, layer)
        seconds[name] = time.process_time() - begun
    slowest = max(seconds, key=seconds.__getitem__)
    return seconds[slowest], slowest, len(names)


def _pair(make: Callable[[], list[Any]]) -> tuple[Work, Work]:
    module = _model("resnet18")
    handle, loader = tl.wrap(module), DataLoader(TensorDataset(_images(IMAGES)), BATCH)

    def bare() -> None:
        with torch.no_grad():
            for (inputs,) in loader:
                module(inputs)

    return lambda: scan(handle, open_data(loader, handle.spec), {layer: make() for layer in LAYERS}), bare


class _Noise(Dataset[Tensor]):
    """Images made when asked for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))


def _tiny(n: int) -> Work:
    """Every statistic that does not grow, of a model so small that its own memory hides nothing."""
    handle = tl.wrap(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten()).eval(), input_size=(3, 16, 16))

    handle.trace()

    def work() -> None:
        statistics = [Top(9), Sampled(256), Moments(covariance=True), Histogram(), Quantiles(512)]
        scan(handle, open_data(_Noise(n), handle.spec), {"1": statistics}, batch_size=32)

    return work


def _fresh(n: int) -> int:
    found = subprocess.run([sys.executable, __file__, "--memory", str(n)], check=True, capture_output=True, text=True)
    return int(json.loads(found.stdout))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
