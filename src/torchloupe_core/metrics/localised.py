"""Metrics against masks: whether a map points at what is there, and whether it boxes the object or cuts it out."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.methods.localisation import (
    CAM_BOX_THRESHOLD,
    Box,
    boxes_around,
    energy_inside,
    overlap,
    pointing_hit,
    top_area_iou,
)
from torchloupe_core.metrics.case import Case
from torchloupe_core.registry import find, method

__all__ = ["average_precision", "corloc", "energy_pointing", "iou", "pointing", "segmentation"]


@method(
    "compare",
    "pointing",
    better="higher",
    any_scale=True,
    cost="no forward",
    paper="Zhang et al. 2016, Excitation Backprop, section 4.1",
)
def pointing(case: Case, *, tolerance: int = 0) -> Tensor:
    """1 where the maximum lies in the mask, or within `tolerance` pixels of it; 15 at 224 pixels in the paper."""
    return pointing_hit(case.maps, case.truth(), tolerance=tolerance).float()


@method(
    "compare",
    "energy_pointing",
    better="higher",
    any_scale=True,
    cost="no forward",
    paper="Wang et al. 2020, Score-CAM, section 4.3",
)
def energy_pointing(case: Case) -> Tensor:
    """The share of the positive values inside the mask."""
    return energy_inside(case.maps, case.truth())


@method(
    "compare",
    "iou",
    better="higher",
    any_scale=True,
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
    any_scale=True,
    cost="no forward",
    paper="Choe et al. 2020, Evaluating WSOL methods right (PxAP)",
)
def average_precision(case: Case) -> Tensor:
    """Mean precision over the mask's pixels, the map being the score of a pixel; equal values count together."""
    return torch.stack([_precision(*one) for one in zip(case.maps, case.truth(), strict=True)])


@method(
    "compare",
    "corloc",
    better="higher",
    any_scale=True,
    cost="no forward",
    paper="Deselaers et al. 2012, Weakly Supervised Localization (CorLoc); the box as in Zhou et al. 2016",
)
def corloc(case: Case, *, threshold: float = CAM_BOX_THRESHOLD, iou: float = 0.5) -> Tensor:
    """1 where the map's box overlaps the box around the mask by more than `iou`, intersection over union.

    The map's box is the first of `Attribution.boxes`: around the heaviest region above `threshold` of the maximum.
    """
    if not 0 <= iou < 1:
        raise BadInput(f"iou is from 0 to below 1; got {iou}")
    masks = case.truth()
    there = masks.flatten(1).any(1)
    own = _filled([one[0] if one else (0, 0, 0, 0) for one in boxes_around(case.maps, threshold)], masks)
    true = _filled([_around(mask) if mask.any() else (0, 0, 0, 0) for mask in masks], masks)
    return (overlap(own, true) > iou).float().where(there, torch.nan)


@method(
    "compare",
    "segmentation",
    better="higher",
    any_scale=True,
    cost="no forward",
    paper="Simonyan et al. 2013, Deep Inside Convolutional Networks, section 3.2 (GrabCut)",
)
def segmentation(case: Case) -> Tensor:
    """Overlap of the mask with the object that `Attribution.segment` cuts out, intersection over union.

    A map that is the same everywhere cuts nothing out. Needs `pip install "torchloupe[segment]"`.
    """
    masks, cut = case.truth(), find("segment", "opencv.grabcut").run
    says = case.maps.flatten(1).amax(1) > case.maps.flatten(1).amin(1)
    found = torch.zeros_like(masks)
    if says.any():
        found[says] = cut(case.query.handle.spec.display(case.query.inputs).float().cpu()[says], case.maps[says])
    return overlap(found, masks)


def _around(mask: Tensor) -> Box:
    rows, columns = mask.nonzero(as_tuple=True)
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def _filled(boxes: list[Box], like: Tensor) -> Tensor:
    """`[N, H, W]` bool: the inside of a box each."""
    found = torch.zeros_like(like)
    for one, (top, left, bottom, right) in zip(found, boxes, strict=True):
        one[top:bottom, left:right] = True
    return found


def _precision(values: Tensor, mask: Tensor) -> Tensor:
    ordered, order = values.flatten().sort(descending=True, stable=True)
    inside = mask.flatten()[order].double()
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])  # of the pixels of one value
    found, seen = inside.cumsum(0)[last], (torch.arange(len(inside)) + 1.0)[last]
    gained = torch.diff(found, prepend=torch.zeros(1, dtype=found.dtype))
    return ((found / seen * gained).sum() / inside.sum()).float()
