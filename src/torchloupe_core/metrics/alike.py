"""How alike two maps are, whatever their scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Windows", "correlation", "proportional", "ranks", "spearman", "ssim", "top_overlap"]

WINDOW = 11  # pixels, of the Gaussian of structural similarity, with sigma 1.5 (Wang 2004)
TOP = 0.1  # of the pixels
SAME = 1e-4  # of the largest value, between maps that are one up to scale


def ranks(values: Tensor) -> Tensor:
    """`[N, P]` float64: each value's rank among its row, equal values sharing their mean rank."""
    ordered, order = values.flatten(1).sort(dim=1, stable=True)
    places = torch.arange(ordered.shape[1], dtype=torch.float64)
    found = torch.empty(ordered.shape, dtype=torch.float64)
    for row in range(len(ordered)):
        _, group, sizes = torch.unique_consecutive(ordered[row], return_inverse=True, return_counts=True)
        means = torch.zeros(len(sizes), dtype=torch.float64).scatter_add_(0, group, places) / sizes
        found[row, order[row]] = means[group]
    return found


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """`[N]`: rank correlation of maps `[N, H, W]`; NaN where one of two is constant."""
    return correlation(ranks(a), ranks(b))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """`[N]`: of rows `[N, P]`."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    found: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return found.float()


def top_overlap(a: Tensor, b: Tensor, share: float = TOP) -> Tensor:
    """`[N]` in [0, 1]: which share of the highest pixels of one are among those of the other."""
    count = max(1, round(share * a[0].numel()))
    chosen = [
        torch.zeros_like(one.flatten(1), dtype=torch.bool).scatter_(
            1, one.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :count], True
        )
        for one in (a, b)
    ]
    both: Tensor = (chosen[0] & chosen[1]).sum(1) / count
    return both


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """`[N]`: structural similarity of maps `[N, H, W]`, each scaled to [0, 1] (Wang et al. 2004)."""
    return Windows(a).similarity(Windows(b))


class Windows:
    """Maps as structural similarity sees them, for several comparisons: scaled, each window's mean and variance."""

    def __init__(self, maps: Tensor) -> None:
        self.maps = _scaled(maps.double())
        self.mean = _smoothed(self.maps)
        self.variance = _smoothed(self.maps**2) - self.mean**2

    def similarity(self, other: Windows) -> Tensor:
        """`[N]`."""
        joint = _smoothed(self.maps * other.maps) - self.mean * other.mean
        steady = (2 * self.mean * other.mean + 0.01**2) / (self.mean**2 + other.mean**2 + 0.01**2)
        return (steady * (2 * joint + 0.03**2) / (self.variance + other.variance + 0.03**2)).mean((1, 2)).float()


def _smoothed(values: Tensor) -> Tensor:
    """The weighted mean of each window, one dimension after the other."""
    radius = (min(WINDOW, *values.shape[1:]) - 1) // 2
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = (line / line.sum())[None, None]
    return F.conv2d(F.conv2d(values[:, None], kernel[:, :, None]), kernel[..., None])[:, 0]


def proportional(a: Tensor, b: Tensor) -> bool:
    """Whether each map of one is a positive multiple of the other's, and not zero."""
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    peak_a, peak_b = flat_a.abs().amax(1, keepdim=True), flat_b.abs().amax(1, keepdim=True)
    if not bool((peak_a > 0).all() and (peak_b > 0).all()):
        return False
    return bool((flat_a / peak_a - flat_b / peak_b).abs().max() <= SAME)


def _scaled(maps: Tensor) -> Tensor:
    low, high = maps.flatten(1).amin(1)[:, None, None], maps.flatten(1).amax(1)[:, None, None]
    return (maps - low) / (high - low).where(high > low, 1.0)
