"""A data set laid out in two or three dimensions: what `embed` returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.results import Result
from torchloupe_core.thumbnails import thumbnails

if TYPE_CHECKING:
    from torchloupe_core.columns import ColumnLike
    from torchloupe_core.evengrid import Grid

__all__ = ["Embedding", "Projection", "require_images"]

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Projection:
    """What a method of the verb "embed" returns: `points [N, dims]`, and what it knows of its own quality.

    Such a method is `f(vectors, dims, seed, *, options)` of finite `vectors [N, D]`, float32, not all the same.
    """

    points: Tensor
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


def require_images(method: str, count: int, least: int, dims: int) -> None:
    """Raises `BadInput` where there are fewer images than a method can lay out."""
    if count < least:
        raise BadInput(f"{method} in {dims} dimensions takes at least {least} images; got {count}")


@dataclass(frozen=True, eq=False)
class Embedding(Result):
    """Every image of a data set as a point.

    points: `[N, dims]` float32. labels: `[N]`, -1 where unknown; classes: their names. indices: `[N]`, which image of
    the data set each is. names: their files, if they are files. layer: what was laid out. skipped: the images that
    could not be read, with why. diagnostics: `trustworthiness`, from 0 to 1, how far neighbours among the points are
    neighbours among the features (Venna and Kaski 2001), and what the method says of itself. pictures: small ones,
    `[N, 3, s, s]` uint8, where they were kept; else they are read again when a drawing wants them.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_embedding"

    points: Tensor
    labels: Tensor
    indices: Tensor
    names: tuple[str, ...] | None
    classes: tuple[str, ...] | None
    layer: str
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    pictures: Tensor | None = None
    data: DataSet | None = None

    def __len__(self) -> int:
        return len(self.points)

    @property
    def dims(self) -> int:
        """2 or 3."""
        return self.points.shape[1]

    @property
    def labelled(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels >= 0).any())

    def name(self, row: int) -> str:
        """What to call the image of a point."""
        return self.names[row] if self.names is not None else f"image {int(self.indices[row])}"

    def thumbnails(
        self, size: int = 48, rows: Tensor | None = None, *, progress: Report = lambda done, total: None
    ) -> Tensor:
        """`[N, 3, size, size]` uint8: small pictures of the images, or of those in some rows.

        One that cannot be read any more is grey. Raises `BadInput` where nothing says what the images were, as in
        a result opened from a file whose images were no files.
        """
        return thumbnails(self, torch.arange(len(self)) if rows is None else rows, size, progress)

    def with_pictures(self, size: int = 48, *, progress: Report = lambda done, total: None) -> Embedding:
        """The same with small pictures kept, so that `save` writes them too."""
        return replace(self, pictures=self.thumbnails(size, progress=progress))

    def grid(self, *, most: int = 2000, shape: tuple[int, int] | None = None) -> Grid:
        """The images in an even grid, one in each cell, such that they move as little as possible.

        The sum of squared distances between points and cells is the least there is, by an assignment solver. most: if
        there are more images, so many of them are drawn at random by the seed; 2,000 take a few seconds, twice as many
        about eight times as long. shape: rows and columns, the squarest unless given.
        """
        from torchloupe_core.evengrid import even_grid

        return even_grid(self, most, shape)

    def html(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Mapping[str, ColumnLike] | None = None,
        pictures: bool = True,
        budget: float = 16.0,
        title: str | None = None,
        progress: Report = lambda done, total: None,
    ) -> Path:
        """Writes one page that needs nothing else: zoom, pan, touch, keyboard, the image under the pointer.

        columns: values by name to colour by, one for each image, besides the label. budget: what the pictures may take,
        in megabytes; they are as large as that allows. Raises `BadInput` for three dimensions.
        """
        from torchloupe_core.page import write_page

        return write_page(
            self, Path(path), columns or {}, pictures=pictures, budget=budget, title=title, report=progress
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As every result; the data set itself is not saved, pictures are where they were kept."""
        return Result.save(replace(self, data=None), path)
