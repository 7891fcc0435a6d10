"""How well a map points at what is known to be there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput

__all__ = ["CAM_BOX_THRESHOLD", "Box", "boxes_around", "energy_inside", "overlap", "pointing_hit", "top_area_iou"]

Box = tuple[int, int, int, int]

CAM_BOX_THRESHOLD = 0.2  # of the maximum (Zhou 2016, section 3.2)


def pointing_hit(maps: Tensor, masks: Tensor, *, tolerance: int = 0) -> Tensor:
    """`[N]` bool: whether the maximum lies in the mask or within `tolerance` pixels of it (pointing game, Zhang 2016).

    maps `[N, H, W]`, masks `[N, H, W]` bool. Of several equal maxima the first counts.
    """
    _check(maps, masks)
    if tolerance:
        size = 2 * tolerance + 1
        masks = F.max_pool2d(masks[:, None].float(), size, 1, tolerance)[:, 0] > 0
    peaks = maps.flatten(1).argmax(1)
    return masks.flatten(1)[torch.arange(len(maps)), peaks]


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """`[N]` in [0, 1]: the share of the positive values inside the mask (energy pointing game, Wang 2020).

    A map without positive values gives 0.
    """
    _check(maps, masks)
    positive = maps.clamp(min=0)
    total = positive.sum((1, 2))
    return (positive * masks).sum((1, 2)) / total.where(total > 0, 1.0)


def top_area_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """`[N]` in [0, 1]: overlap of the mask with as many of the map's highest pixels as the mask has."""
    _check(maps, masks)
    ranks = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    area = masks.flatten(1).sum(1, keepdim=True)
    return overlap((ranks < area).view(masks.shape), masks)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """`[N]` in [0, 1]: intersection over union of masks `[N, H, W]`; 0 where both are empty."""
    return (one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)


def boxes_around(maps: Tensor, threshold: float = CAM_BOX_THRESHOLD) -> list[list[Box]]:
    """For each map of `[N, H, W]` the boxes `(top, left, bottom, right)` around what exceeds a share of its maximum.

    One box a connected region, bottom and right exclusive, the heaviest region first.
    """
    if not 0 < threshold < 1:
        raise BadInput(f"threshold is a share of the maximum, between 0 and 1; got {threshold}")
    return [_boxes(values, threshold) for values in maps]


def _check(maps: Tensor, masks: Tensor) -> None:
    if maps.shape != masks.shape or maps.ndim != 3 or masks.dtype != torch.bool:
        raise BadInput(
            f"maps and masks are both [N, H, W], masks bool; got {list(maps.shape)} and {list(masks.shape)}, "
            f"{masks.dtype}"
        )


def _boxes(values: Tensor, threshold: float) -> list[Box]:
    largest = values.max()
    if largest <= 0:
        return []
    inside = values > threshold * largest
    rows, columns = inside.nonzero(as_tuple=True)
    labels, region = torch.unique(_regions(inside)[inside], return_inverse=True)
    weights = values.new_zeros(len(labels)).index_add(0, region, values[inside])
    ends = []
    for places in (rows, columns):
        none = places.new_zeros(len(labels))
        ends += [none.scatter_reduce(0, region, places, how, include_self=False) for how in ("amin", "amax")]
    top, bottom, left, right = ends
    boxes = torch.stack([top, left, bottom + 1, right + 1], 1)[weights.argsort(descending=True, stable=True)]
    return [(a, b, c, d) for a, b, c, d in boxes.tolist()]


def _regions(mask: Tensor) -> Tensor:
    """Connected regions (8-neighbourhood) numbered from 1, 0 elsewhere: the largest pixel number spreads in each."""
    numbers = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
    while True:
        spread = F.max_pool2d(numbers[None, None].double(), 3, 1, 1)[0, 0].long() * mask
        if torch.equal(spread, numbers):
            return numbers
        numbers = spread
