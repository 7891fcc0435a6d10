"""How well a map points at what is known to be there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput

__all__ = ["energy_inside", "pointing_hit", "top_area_iou"]


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
    chosen = (ranks < area).view(masks.shape)
    union = (chosen | masks).sum((1, 2))
    return (chosen & masks).sum((1, 2)) / union.clamp(min=1)


def _check(maps: Tensor, masks: Tensor) -> None:
    if maps.shape != masks.shape or maps.ndim != 3 or masks.dtype != torch.bool:
        raise BadInput(
            f"maps and masks are both [N, H, W], masks bool; got {list(maps.shape)} and {list(masks.shape)}, "
            f"{masks.dtype}"
        )
