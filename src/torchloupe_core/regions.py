"""Targets that lie somewhere in the image: a class over a region of it, the score of a detected box."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.atoms import Atom, Reduce, Seen, Subject, class_index, class_text
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.layout import Grid

__all__ = ["DEFAULT_IOU", "Box", "BoxScore", "Mask", "Region", "as_box", "as_place"]

DEFAULT_IOU = 0.5


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the model's input: (top, left, bottom, right), bottom and right exclusive.

    Detectors' own outputs are (left, top, right, bottom); everything of ours puts rows before columns.
    """

    top: float
    left: float
    bottom: float
    right: float

    def __post_init__(self) -> None:
        edges = (self.top, self.left, self.bottom, self.right)
        if not (all(map(math.isfinite, edges)) and 0 <= self.top < self.bottom and 0 <= self.left < self.right):
            raise BadInput(
                f"a box is (top, left, bottom, right) in pixels, 0 <= top < bottom and 0 <= left < right; got {edges}"
            )

    def __str__(self) -> str:
        edges = (self.top, self.left, self.bottom, self.right)
        return ",".join(np.format_float_positional(edge, trim="-") for edge in edges)

    def covered(self, image: Grid) -> Tensor:
        """`[H, W]` bool: the pixels whose centre lies inside."""
        height, width = image
        if self.bottom > height or self.right > width:
            raise BadInput(f"the box {self} (top, left, bottom, right) reaches beyond the image of {height}x{width}")
        rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
        inside = (self.top <= rows) & (rows < self.bottom), (self.left <= columns) & (columns < self.right)
        return inside[0][:, None] & inside[1]

    def overlap(self, boxes: Tensor) -> Tensor:
        """Intersection over union with each of some boxes `[D, 4]`, given as (left, top, right, bottom)."""
        own = boxes.new_tensor((self.left, self.top, self.right, self.bottom))
        low, high = torch.maximum(boxes[:, :2], own[:2]), torch.minimum(boxes[:, 2:], own[2:])
        shared = (high - low).clamp(min=0).prod(1)
        return shared / ((own[2:] - own[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared)


@dataclass(frozen=True)
class Mask:
    """A region of any shape, `size` (h, w): the lengths of its runs row by row, outside and inside by turns."""

    size: Grid
    runs: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.size) < 1 or sum(self.runs) != self.size[0] * self.size[1] or min(self.runs[1:], default=1) < 1:
            raise BadInput(f"a mask's runs are at least 1 long and add up to its {self.size[0]}x{self.size[1]} pixels")
        if len(self.runs) < 2:
            raise BadInput("the mask is empty; it marks no position")

    @classmethod
    def of(cls, mask: Any) -> Mask:
        """A mask from a bool tensor or array `[h, w]`."""
        values = torch.as_tensor(mask).detach().cpu()
        if values.dtype != torch.bool or values.ndim != 2 or 0 in values.shape:
            raise BadInput(
                f"a region is a bool mask [H, W] or a box (top, left, bottom, right); got {values.dtype} of shape "
                f"{list(values.shape)}"
            )
        flat = torch.cat([torch.tensor([False]), values.flatten()])  # so that the first run is outside
        turns = (flat[1:] != flat[:-1]).nonzero().flatten().tolist()
        ends = [0, *turns, values.numel()]
        return cls((values.shape[0], values.shape[1]), tuple(b - a for a, b in itertools.pairwise(ends)))

    def __str__(self) -> str:
        return f"mask[{','.join(map(str, (*self.size, *self.runs)))}]"

    def covered(self) -> Tensor:
        """`[h, w]` bool."""
        inside = torch.arange(len(self.runs)) % 2 == 1
        return inside.repeat_interleave(torch.tensor(self.runs)).view(self.size)


@dataclass(frozen=True)
class Region(Atom):
    """The mean logit of a class over a part of the image; `image` (H, W) is known once bound."""

    label: int | str
    where: Box | Mask | None = None
    image: Grid = (0, 0)

    def __str__(self) -> str:
        return f"region:{class_text(self.label)}" + ("" if self.where is None else f"@{self.where}")

    def bound(self, model: Subject) -> Region:
        return replace(self, label=class_index(self.label, model), image=model.image)

    def read(self, seen: Seen, reduce: Reduce) -> Tensor:
        maps, index = seen.class_maps(), int(self.label)
        if index >= maps.shape[1]:
            raise UnknownName(f"no class {index}; the model has {maps.shape[1]} outputs")
        weights = self._weights((maps.shape[2], maps.shape[3])).to(maps)
        inside = weights > 0
        return (maps[:, index, inside] * weights[inside]).sum(1) / weights.sum()

    def _weights(self, size: Grid) -> Tensor:
        """`[h, w]`: the share of each position of the output that lies in the region."""
        if self.where is None:
            return torch.ones(size)
        covered = self.where.covered(self.image) if isinstance(self.where, Box) else self.where.covered()
        if covered.shape not in (self.image, size):
            raise BadInput(
                f"the region's mask is {list(covered.shape)}; a mask has the size of the image, {list(self.image)}, or "
                f"of the output, {list(size)}"
            )
        if not covered.any():
            raise BadInput(f"the box {self.where} holds no pixel's centre")
        return F.interpolate(covered[None, None].float(), size, mode="area")[0, 0]


@dataclass(frozen=True)
class BoxScore(Atom):
    """How well the best detection of a class fits a box: its score times its overlap, 0 where none fits."""

    label: int | str
    box: Box
    iou: float = DEFAULT_IOU

    def __post_init__(self) -> None:
        if not 0 <= self.iou <= 1:
            raise BadInput(f"iou is the least overlap of a detection with the box, from 0 to 1; got {self.iou}")

    def __str__(self) -> str:
        least = "" if self.iou == DEFAULT_IOU else "," + np.format_float_positional(self.iou, trim="-")
        return f"box_score:{class_text(self.label)}@{self.box}{least}"

    def bound(self, model: Subject) -> BoxScore:
        return replace(self, label=class_index(self.label, model))

    def read(self, seen: Seen, reduce: Reduce) -> Tensor:
        return torch.stack([self._best(one["boxes"], one["labels"], one["scores"]) for one in seen.detections()])

    def _best(self, boxes: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        # A constant weight: where it is greatest, at the detection's own box, it has a kink for rounding to fall off.
        overlap = self.box.overlap(boxes.detach())  # [D]
        fits = (labels == self.label) & (overlap >= self.iou)
        values = (overlap * scores)[fits]  # where nothing fits, an empty one that still has a graph
        return torch.cat([values, scores.new_zeros(1)]).amax()


def as_place(place: Any) -> Box | Mask | None:
    """A region from a bool mask, a box of four numbers, or None for the whole image."""
    if place is None:
        return None
    if isinstance(place, (Tensor, np.ndarray)) and place.ndim != 1:
        return Mask.of(place)
    return as_box(place)


def as_box(box: Sequence[float] | Tensor) -> Box:
    """A box from four numbers, (top, left, bottom, right)."""
    try:
        edges = [float(edge) for edge in box]
    except (TypeError, ValueError):
        edges = []
    if len(edges) != 4:
        raise BadInput(f"a box is four numbers, (top, left, bottom, right); got {box!r}")
    return Box(*edges)
