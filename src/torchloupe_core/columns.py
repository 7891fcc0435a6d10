"""Columns to colour points by: a few kinds, or values on a scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.errors import BadInput

__all__ = ["Column", "ColumnLike", "column", "labels_column"]

ColumnLike = Sequence[Any] | Tensor | np.ndarray[Any, Any]

KINDS = 20  # more whole numbers than this are a scale
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Column:
    """A value for each point: `codes [N]` into `kinds`, -1 where unknown, or `values [N]` float32, NaN where unknown.

    kinds: names, in order; None for values on a scale.
    """

    title: str
    values: Tensor
    kinds: tuple[str, ...] | None = None

    @property
    def codes(self) -> Tensor:
        """`[N]` whole numbers."""
        return self.values.long()

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and highest value known."""
        known = self.values[self.values.isfinite()]
        return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)

    def frequent(self, most: int) -> tuple[Column, int]:
        """The `most` kinds with most points, the others as one more, "other"; and how many those were."""
        if self.kinds is None or len(self.kinds) <= most:
            return self, 0
        counts = Counter(self.codes.tolist())
        chosen = sorted(sorted(range(len(self.kinds)), key=lambda code: -counts[code])[: most - 1])
        place = torch.full((len(self.kinds) + 1,), len(chosen), dtype=torch.long)
        place[chosen] = torch.arange(len(chosen))
        place[-1] = -1  # unknown stays so
        kinds = (*(self.kinds[code] for code in chosen), f"{len(self.kinds) - len(chosen)} others")
        return Column(self.title, place[self.codes].float(), kinds), len(self.kinds) - len(chosen)


def column(title: str, given: ColumnLike, count: int) -> Column:
    """Texts, truth values and at most 20 different whole numbers are kinds, all else is a scale. None is unknown."""
    values = given.tolist() if isinstance(given, (Tensor, np.ndarray)) else list(given)
    if len(values) != count or any(isinstance(one, (list, tuple)) for one in values):
        shape = list(given.shape) if isinstance(given, (Tensor, np.ndarray)) else [len(values)]
        raise BadInput(f"column {title!r} has one value for each of the {count} points; got {shape}")
    known = [one for one in values if one is not None]
    numbers = all(isinstance(one, (int, float, np.number)) and not isinstance(one, bool) for one in known)
    whole = numbers and all(isinstance(one, (int, np.integer)) for one in known)
    if numbers and not (whole and len(set(known)) <= KINDS):
        scale = torch.tensor([np.nan if one is None else float(one) for one in values])
        return Column(title, scale.where(scale.isfinite(), torch.nan))
    kinds = sorted(set(known)) if whole else sorted(set(map(str, known)))
    place = {kind: code for code, kind in enumerate(kinds)}
    codes = [-1 if one is None else place[one if whole else str(one)] for one in values]
    return Column(title, torch.tensor(codes).float(), tuple(map(str, kinds)))


def labels_column(labels: Tensor, classes: tuple[str, ...] | None) -> Column:
    """The labels as kinds, by class name where it is known; only those that occur."""
    present = sorted(set(labels[labels >= 0].tolist()))
    if not present:
        raise BadInput("the images have no labels; give by= a value for each image, or None")
    names = [classes[one] if classes is not None and one < len(classes) else str(one) for one in present]
    place = torch.full((max(present) + 2,), -1)
    place[present] = torch.arange(len(present))
    return Column("label", place[labels].float(), tuple(names))
