"""The most similar images of a data set: what `neighbors` returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet
from torchloupe_core.results import Result
from torchloupe_core.thumbnails import thumbnails

__all__ = ["Neighbors", "Shown", "Space"]

Space = Literal["features", "pixels"]
Report = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Shown:
    """Some images that can be shown: which of a data set, their labels, their files, and where they are read."""

    indices: Tensor
    labels: Tensor
    names: tuple[str, ...] | None
    pictures: Tensor | None
    data: DataSet | None

    def name(self, row: int) -> str:
        """What to call an image: the end of its file's name, or its number."""
        return Path(self.names[row]).name if self.names is not None else f"image {int(self.indices[row])}"

    def thumbnails(self, size: int, progress: Report = lambda done, total: None) -> Tensor:
        """`[N, 3, size, size]` uint8."""
        return thumbnails(self, torch.arange(len(self.indices)), size, progress)


@dataclass(frozen=True, eq=False)
class Neighbors(Result):
    """For each of Q queries the k nearest images of a data set, the nearest first; equally near ones by index.

    indices: `[Q, k]`, which images of the data set. distances: `[Q, k]` float64; 1 - cos, from 0 to 2, or Euclidean, of
    the layer's features or of pixels in [0, 1]. labels: `[Q, k]`, query_labels: `[Q]`, -1 where unknown; classes: their
    names. names: the files of the neighbours, query after query, query_names those of the queries, if they are files.
    query_indices: `[Q]`, which images of their own data set the queries are. excluded: whether each query, itself in
    the data set, was left out. diagnostics: how many images were searched, and of an approximate search its `recall`,
    the share of true neighbours it found, measured on `recall_queries` of the queries. pictures, query_pictures: small
    ones, where they were kept.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_neighbors"

    indices: Tensor
    distances: Tensor
    labels: Tensor
    query_indices: Tensor
    query_labels: Tensor
    space: Space
    metric: str
    layer: str | None
    excluded: bool
    names: tuple[str, ...] | None = None
    query_names: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    pictures: Tensor | None = None
    query_pictures: Tensor | None = None
    data: DataSet | None = None
    query_data: DataSet | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def k(self) -> int:
        """How many neighbours there are of each query."""
        return self.indices.shape[1]

    @property
    def found(self) -> Shown:
        """The neighbours, `Q * k` of them, query after query."""
        return Shown(self.indices.flatten(), self.labels.flatten(), self.names, self.pictures, self.data)

    @property
    def queries(self) -> Shown:
        """The Q queries."""
        return Shown(self.query_indices, self.query_labels, self.query_names, self.query_pictures, self.query_data)

    def thumbnails(self, size: int = 64) -> Tensor:
        """`[Q, k, 3, size, size]` uint8: small pictures of the neighbours."""
        small = self.found.thumbnails(size)
        return small.view(len(self), self.k, *small.shape[1:])

    def query_thumbnails(self, size: int = 64) -> Tensor:
        """`[Q, 3, size, size]` uint8: small pictures of the queries."""
        return self.queries.thumbnails(size)

    def label_agreement(self) -> Tensor:
        """`[Q]`: the share of each query's neighbours that have its label; NaN where the query has none."""
        same = (self.labels == self.query_labels[:, None]).double().mean(1)
        return same.where(self.query_labels >= 0, torch.nan)

    def with_pictures(self, size: int = 64) -> Neighbors:
        """The same with small pictures kept, so that `save` writes them too."""
        return replace(self, pictures=self.found.thumbnails(size), query_pictures=self.queries.thumbnails(size))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As every result; the data set itself is not saved, pictures are where they were kept."""
        return Result.save(replace(self, data=None, query_data=None), path)
