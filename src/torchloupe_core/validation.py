"""Influence held against trainings: what `validate_influence` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchloupe_core.results import Result

__all__ = ["COLUMNS", "Validation"]

COLUMNS = {
    "leave_one_out": "leave one out",
    "leave_k_out": "leave k out",
    "lds": "LDS",
    "precision": "wrong labels",
    "removal": "removal",
    "seconds": "seconds",
}


@dataclass(frozen=True, eq=False)
class Validation(Result):
    """How well each of M methods foretold what trainings without some training images came to.

    rows: one for each method, NaN where a check was not asked for or cannot be made.
    `leave_one_out`, `leave_k_out`: Spearman's correlation of the scores with the change of each test's question, when
    that image or group is removed, the mean over tests. `lds`: the same for random subsets of a share of the images
    (Park et al. 2023, TRAK). `precision`: the share of wrong labels among the most suspicious training images, as many
    as there are; suspicious is what speaks against the tests. `removal`: by how much the mean question rises when the
    most helpful images are removed, over removing as many at random, the mean over `shares`. `seconds`: of the method.
    Below them the scores of `clean` that wrong labels were looked for by as well.

    names: of the methods. refits: what was trained again, in words; trainings: how many. about: what is measured of a
    test. single_, group_, subset_predicted `[M, T, g]` and _actual `[T, g]`: behind the first three columns, the change
    of each of T questions when g images, groups, or all but a subset are removed. suspicion `[R, n]` of what
    `suspicious` names, wrong `[n]`: behind precision, NaN where a method was not asked. removal `[M + 1, s]`: the mean
    question at each share removed, the last row at random; question: with nothing removed. train_indices: of the n
    columns.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_validation"

    names: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    refits: str
    trainings: int
    about: str
    question: float
    train_indices: Tensor
    single_predicted: Tensor | None = None
    single_actual: Tensor | None = None
    group_predicted: Tensor | None = None
    group_actual: Tensor | None = None
    subset_predicted: Tensor | None = None
    subset_actual: Tensor | None = None
    suspicious: tuple[str, ...] = ()
    suspicion: Tensor | None = None
    wrong: Tensor | None = None
    shares: tuple[float, ...] = ()
    removal: Tensor | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """The rows as text, a column for each check that was made."""
        known = [name for name in COLUMNS if any(not math.isnan(row[name]) for row in self.rows)]
        cells = [["", *(COLUMNS[name] for name in known)]]
        cells += [[str(row["method"]), *(_cell(name, row[name]) for name in known)] for row in self.rows]
        widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
        return "\n".join(_line(row, widths) for row in cells)

    def __str__(self) -> str:
        return self.table()

    def precision_at(self, k: int) -> Mapping[str, float]:
        """The share of wrong labels among the k most suspicious training images, by method."""
        if self.suspicion is None or self.wrong is None:
            return {}
        rows = dict(zip(self.suspicious, self.suspicion, strict=True))
        first = {name: row.argsort(descending=True, stable=True)[:k] for name, row in rows.items()}
        return {
            name: self.wrong[chosen].double().mean().item()
            for name, chosen in first.items()
            if not torch.isnan(rows[name]).any()
        }


def _cell(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if name == "seconds" else f"{value:+.3g}" if name == "removal" else f"{value:.3f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.rjust(width) if place else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()
