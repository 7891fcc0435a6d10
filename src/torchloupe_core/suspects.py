"""Labels that may be wrong: what `clean` returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.results import Result
from torchloupe_core.thumbnails import thumbnails

__all__ = ["SCORES", "Suspects"]

SCORES = {
    "loss": "loss",
    "margin": "margin of the best other class",
    "self_influence": "self-influence",
    "neighbors": "neighbours of other classes",
}
KEPT, THUMBNAIL = 200, 96  # pictures in a saved result, and their pixels


@dataclass(frozen=True, eq=False)
class Suspects(Result):
    """The labels of n images, by how suspicious each is to the model.

    scores: `[4, n]`, larger is more suspicious, in the order of `score_names`: "loss", "margin", "self_influence",
    "neighbors". suspicion: `[n]` from 0 to 1, the mean over scores of the share of images that are less suspicious.
    indices: of the images in the data set; labels: as given; predictions: the class the model takes each for, and its
    probability, confidences. k: how many neighbours were asked.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_suspects"

    scores: Tensor
    indices: Tensor
    labels: Tensor
    predictions: Tensor
    confidences: Tensor
    k: int
    score_names: tuple[str, ...] = tuple(SCORES)
    classes: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    kept: Tensor | None = None  # [M, 3, 96, 96] bytes, in a result that was saved
    kept_rows: Tensor | None = None
    data: DataSet | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def shares(self) -> Tensor:
        """`[4, n]`: for each score the share of the other images that are less suspicious; equal ones count half."""
        ordered = self.scores.double().sort(1).values
        below, upto = (torch.searchsorted(ordered, self.scores.double(), right=right) for right in (False, True))
        return (below + upto - 1).double() / 2 / max(1, len(self) - 1)

    @property
    def suspicion(self) -> Tensor:
        """`[n]`: the mean of `shares`."""
        return self.shares.mean(0)

    def by(self, score: str | None = None) -> Tensor:
        """`[n]`: one of the scores, all of them together unless named. Raises `BadInput` for another name."""
        if score is None:
            return self.suspicion
        if score not in self.score_names:
            raise BadInput(f"there is no score {score!r}; there are {', '.join(self.score_names)}")
        return self.scores[self.score_names.index(score)]

    def order(self, score: str | None = None) -> Tensor:
        """`[n]`: rows, the most suspicious first; of equal ones the first in the data set."""
        return self.by(score).argsort(descending=True, stable=True)

    def top(self, k: int = 20, by: str | None = None) -> Tensor:
        """`[k]`: indices of the images whose labels are most suspicious."""
        if k < 1:
            raise BadInput(f"k is at least 1; got {k}")
        return self.indices[self.order(by)[:k]]

    def name(self, row: int) -> str:
        """What to call the image of a row."""
        return self.names[row] if self.names is not None else f"image {int(self.indices[row])}"

    def class_name(self, label: int) -> str:
        """The name of a class, or its number."""
        return self.classes[label] if self.classes is not None and label < len(self.classes) else str(label)

    def thumbnails(self, rows: Tensor, size: int, report: Callable[[int, int], None] = lambda *_: None) -> Tensor:
        """`[R, 3, size, size]` uint8: of some rows. Raises `BadInput` for one that was not saved with the result."""
        if self.data is not None or self.kept is None or self.kept_rows is None:
            return thumbnails(_Readable(self.indices, self.names, data=self.data), rows, size, report)
        places = {row: place for place, row in enumerate(self.kept_rows.tolist())}
        if lacking := [row for row in rows.tolist() if row not in places]:
            raise BadInput(f"this result was saved without a picture of {self.name(lacking[0])}")
        there = torch.tensor([places[row] for row in rows.tolist()])
        return thumbnails(_Readable(self.indices, self.names, self.kept), there, size, report)

    def html(
        self,
        path: str | os.PathLike[str],
        *,
        k: int = KEPT,
        title: str | None = None,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> Path:
        """A page in one file that needs nothing else, to look through the k most suspicious by each score.

        There they are sorted, marked and written out as a list. Raises `StoreError`.
        """
        from torchloupe_core.suspects_page import write_page

        return write_page(self, Path(path), k, title, progress)

    def save(self, path: str | os.PathLike[str], *, pictures: bool = True) -> Path:
        """As every result, with small pictures of the 200 most suspicious; pictures=False leaves them out."""
        rows = self.order()[:KEPT]
        bare = replace(self, data=None)
        if pictures and self.data is not None:
            bare = replace(bare, kept=self.thumbnails(rows, THUMBNAIL), kept_rows=rows)
        return super(Suspects, bare).save(path)


@dataclass(frozen=True)
class _Readable:
    """Where pictures are read: those that were kept, or the data set."""

    indices: Tensor
    names: tuple[str, ...] | None
    pictures: Tensor | None = None
    data: DataSet | None = None
