"""Regions that attributions point at again and again: windows of many images that look alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Region", "recurring", "windows"]


@dataclass(frozen=True)
class Region:
    """What recurs: `boxes [k, 4]` (top, left, bottom, right) in the images `members [k]`, the one most like the others
    first, and their median `[3, w, w]`."""

    members: Tensor
    boxes: Tensor
    median: Tensor


def windows(maps: Tensor, width: int) -> Tensor:
    """`[N, 2]`: top and left of the window of that width that holds most of the positive values of maps `[N, H, W]`."""
    mass = F.avg_pool2d(maps.clamp(min=0)[:, None].double(), width, 1)[:, 0]
    best = mass.flatten(1).argmax(1)
    return torch.stack([best // mass.shape[2], best % mass.shape[2]], 1)


def recurring(images: Tensor, maps: Tensor, width: int, *, alike: float, least: int) -> Iterator[Region]:
    """Regions that at least `least` images `[N, 3, H, W]` have in common, the most frequent first.

    Each image's window is looked for, up to half a width away, where the maps of the others point, by normalised
    cross-correlation in colour; `alike` of it counts as the same. An image belongs to one region at most.
    """
    corners = windows(maps, width)
    half = width // 2
    patches = _cut(images, corners, width)
    wider = _cut(F.pad(images, [half] * 4, mode="replicate"), corners, width + 2 * half)
    found = _correlations(wider, patches)  # [N, N, s, s]: of image n with the window of m, at each shift
    best, shift = found.flatten(2).max(2)
    same, free = best >= alike, torch.ones(len(images), dtype=torch.bool)
    while True:
        counts = (same & free[:, None]).sum(0) * free
        seed = int(counts.argmax())
        if counts[seed] < least:
            return
        members = (same[:, seed] & free).nonzero()[:, 0]
        members = members[best[members, seed].argsort(descending=True, stable=True)]
        side = found.shape[3]
        moved = torch.stack([shift[members, seed] // side, shift[members, seed] % side], 1) - half
        places = (corners[members] + moved).clamp(min=0)
        most = torch.tensor(images.shape[2:]) - width
        places = torch.minimum(places, most)
        median = _cut(images[members], places, width).median(0).values
        yield Region(members, torch.cat([places, places + width], 1), median)
        free[members] = False


def _cut(images: Tensor, corners: Tensor, width: int) -> Tensor:
    """`[N, 3, w, w]`: of each image the window at its corner."""
    places = zip(images, corners.tolist(), strict=True)
    return torch.stack([image[:, top : top + width, left : left + width] for image, (top, left) in places])


def _correlations(wider: Tensor, patches: Tensor) -> Tensor:
    """Normalised cross-correlation of each patch `[M, 3, w, w]` with each larger one `[N, 3, W, W]` at every shift."""
    plain = patches - patches.mean((1, 2, 3), keepdim=True)
    numbers = plain[0].numel()
    together = F.conv2d(wider, plain)
    ones = torch.ones_like(plain[:1])
    sums, squares = F.conv2d(wider, ones), F.conv2d(wider.square(), ones)
    spread = (squares - sums.square() / numbers).clamp(min=1e-6).sqrt()
    found: Tensor = together / (spread * plain.flatten(1).norm(dim=1).clamp(min=1e-3).view(1, -1, 1, 1))
    return found
