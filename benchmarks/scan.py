"""What a pass over a data set costs beyond the bare forward passes over the same loader, on one core.

    python benchmarks/scan.py                  every row, about 10 minutes
    python benchmarks/scan.py Top Moments      the rows whose name begins so

Five layers of resnet18, all channels, at 224 pixels in batches of 8; 96 images are few, so that most of them still
come among the best nine. Ratios and memory are measured as in `explain.py`. Receptive fields are timed for the last
layer with a map of every convolutional network of torchvision's, at 224 pixels; that finds them for all its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from measuring import Row, Rows, asked, grown, memory, ratio, run, seconds
from networks import BATCH, network, noise
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


def beside_bare_passes(goal: float, make: Callable[[], list[Any]]) -> Rows:
    module = network("resnet18")
    handle, loader = tl.wrap(module), DataLoader(TensorDataset(noise(IMAGES)), BATCH)

    def bare() -> None:
        with torch.no_grad():
            for (inputs,) in loader:
                module(inputs)

    def ours() -> None:
        scan(handle, open_data(loader, handle.spec), {layer: make() for layer in LAYERS})

    yield ratio(ours, bare, goal=goal)


def slowest_fields() -> Rows:
    names = torchvision.models.list_models(module=torchvision.models)
    taken = {name: field_seconds(name) for name in names if not name.startswith(("vit_", "swin_", "maxvit_"))}
    slowest = max(taken, key=taken.__getitem__)
    yield Row("", taken[slowest], "s", 5, note=f"{slowest}, of {len(taken)} networks")


def field_seconds(name: str) -> float:
    """For the receptive fields of one network."""
    options = {"init_weights": False} if name in SLOW_TO_MAKE else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # a regnet works its widths out in tensors
        module = torchvision.models.get_model(name, weights=None, **options)
    module = module.to_empty(device="cpu").eval()
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.detach().zero_()
    handle = tl.wrap(module)
    layer = [one.name for one in handle.layers.values() if one.spatial][-1]
    return seconds(lambda: fields(handle, layer))


class Noise(Dataset[Tensor]):
    """Images made when asked for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))


def growth(n: int) -> int:
    """Of every statistic that does not grow, of a model so small that its own memory hides nothing."""
    handle = tl.wrap(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten()).eval(), input_size=(3, 16, 16))
    handle.trace()
    statistics = [Top(9), Sampled(256), Moments(covariance=True), Histogram(), Quantiles(512)]
    return grown(lambda: scan(handle, open_data(Noise(n), handle.spec), {"1": statistics}, batch_size=32))


def growths() -> Rows:
    yield memory("50000", "1000", goal=1.1)


PARTS: dict[str, Callable[[], Rows]] = {
    **{name: partial(beside_bare_passes, *one) for name, one in STATISTICS.items()},
    "receptive fields, slowest network": slowest_fields,
    "memory, 50,000 images against 1,000": growths,
}

if __name__ == "__main__":
    run(PARTS, asked(__doc__), {str(n): partial(growth, n) for n in (1_000, 50_000)})
