"""Images of an embedding in an even grid, one in each cell: what `Embedding.grid` returns."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from torchloupe_core import registry
from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.results import Result
from torchloupe_core.thumbnails import thumbnails

if TYPE_CHECKING:
    from torchloupe_core.embedding import Embedding

__all__ = ["Grid", "even_grid"]

SOLVER = "scipy.linear_sum_assignment"


@dataclass(frozen=True, eq=False)
class Grid(Result):
    """M images of an embedding, each in a cell of its own.

    cells: `[M, 2]`, row from the top and column. rows: `[M]`, which point of the embedding each is; indices: `[M]`,
    which image of the data set. shape: how many rows and columns. labels, names, classes, pictures: as in `Embedding`.
    diagnostics: `moved`, the root of the mean squared way from point to cell, in widths of the grid; `images` of `of`.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_embedding"

    cells: Tensor
    rows: Tensor
    indices: Tensor
    labels: Tensor
    shape: tuple[int, int]
    names: tuple[str, ...] | None
    classes: tuple[str, ...] | None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    pictures: Tensor | None = None
    data: DataSet | None = None

    def __len__(self) -> int:
        return len(self.cells)

    def table(self) -> Tensor:
        """`[rows, columns]`: the image of the data set in each cell, -1 in those left over."""
        table = torch.full(self.shape, -1)
        table[self.cells[:, 0], self.cells[:, 1]] = self.indices
        return table

    def thumbnails(self, size: int = 32, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """`[M, 3, size, size]` uint8: a small picture of each image."""
        return thumbnails(self, torch.arange(len(self)), size, progress)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As every result; pictures are saved where they were kept."""
        return Result.save(replace(self, data=None), path)


def even_grid(found: Embedding, most: int, shape: tuple[int, int] | None) -> Grid:
    """The grid of an embedding, by the assignment of points to cells whose squared ways add up to the least."""
    if found.dims != 2:
        raise BadInput(f"an even grid is made of two dimensions; this embedding has {found.dims}, ask with dims=2")
    if most < 1:
        raise BadInput(f"a grid holds at least 1 image; got most={most}")
    begun, rows = time.perf_counter(), _drawn(len(found), most, found.seed)
    down, across = _shape(len(rows), shape)
    points, centres = _placed(found.points[rows]), _centres(down, across)
    ways = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
    cells: Tensor = registry.find("assign", SOLVER).run(ways)
    moved = ways[torch.arange(len(rows)), cells].mean().sqrt().item()
    return Grid(
        method=SOLVER,
        backend="scipy",
        seed=found.seed,
        seconds=time.perf_counter() - begun,
        forwards=0,
        versions=found.versions,
        options={"most": most, "embedding": found.method, **found.options},
        cells=torch.stack([cells // across, cells % across], 1),
        rows=rows,
        indices=found.indices[rows],
        labels=found.labels[rows],
        shape=(down, across),
        names=None if found.names is None else tuple(found.names[row] for row in rows.tolist()),
        classes=found.classes,
        diagnostics={"moved": moved, "images": len(rows), "of": len(found)},
        pictures=None if found.pictures is None else found.pictures[rows],
        data=found.data,
    )


def _drawn(count: int, most: int, seed: int) -> Tensor:
    """Which points: all of them, or so many drawn at random, in order."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def _shape(count: int, given: tuple[int, int] | None) -> tuple[int, int]:
    """The squarest grid of at least as many cells."""
    if given is None:
        across = math.ceil(math.sqrt(count))
        return math.ceil(count / across), across
    if len(given) != 2 or min(given) < 1 or given[0] * given[1] < count:
        raise BadInput(f"a grid of {count} images is rows and columns of at least as many cells; got {tuple(given)}")
    return given[0], given[1]


def _placed(points: Tensor) -> Tensor:
    """Points in the unit square, each axis stretched to it, the second upwards as in a scatter."""
    points = points.double()
    low, high = points.amin(0), points.amax(0)
    unit = (points - low) / (high - low).where(high > low, 1.0)
    return torch.stack([1 - unit[:, 1], unit[:, 0]], 1)


def _centres(down: int, across: int) -> Tensor:
    rows, columns = (torch.arange(count, dtype=torch.float64).add(0.5) / count for count in (down, across))
    return torch.cartesian_prod(rows, columns)
