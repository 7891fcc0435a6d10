"""Metrics against masks: whether a map points at what is there."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.methods.localisation import energy_inside, pointing_hit, top_area_iou
from torchloupe_core.metrics.case import Case
from torchloupe_core.registry import method

__all__ = ["average_precision", "energy_pointing", "iou", "pointing"]


@method(
    "compare",
    "pointing",
    better="higher",
    cost="no forward",
    paper="Zhang et al. 2016, Excitation Backprop, section 4.1",
)
def pointing(case: Case, *, tolerance: int = 0) -> Tensor:
    """1 where the maximum lies in the mask, or within `tolerance` pixels of it; 15 at 224 pixels in the paper."""
    return pointing_hit(case.maps, case.truth(), tolerance=tolerance).float()


@method(
    "compare", "energy_pointing", better="higher", cost="no forward", paper="Wang et al. 2020, Score-CAM, section 4.3"
)
def energy_pointing(case: Case) -> Tensor:
    """The share of the positive values inside the mask."""
    return energy_inside(case.maps, case.truth())


@method(
    "compare",
    "iou",
    better="higher",
    cost="no forward",
    paper="Simonyan et al. 2013, Deep Inside Convolutional Networks",
)
def iou(case: Case) -> Tensor:
    """Overlap of the mask with as many of the highest pixels as the mask has."""
    return top_area_iou(case.maps, case.truth())


@method(
    "compare",
    "average_precision",
    better="higher",
    cost="no forward",
    paper="Choe et al. 2020, Evaluating WSOL methods right (PxAP)",
)
def average_precision(case: Case) -> Tensor:
    """Mean precision over the mask's pixels, the map being the score of a pixel; equal values count together."""
    return torch.stack([_precision(*one) for one in zip(case.maps, case.truth(), strict=True)])


def _precision(values: Tensor, mask: Tensor) -> Tensor:
    ordered, order = values.flatten().sort(descending=True, stable=True)
    inside = mask.flatten()[order].double()
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])  # of the pixels of one value
    found, seen = inside.cumsum(0)[last], (torch.arange(len(inside)) + 1.0)[last]
    gained = torch.diff(found, prepend=torch.zeros(1, dtype=found.dtype))
    return ((found / seen * gained).sum() / inside.sum()).float()
