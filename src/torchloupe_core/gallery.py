"""Pictures in rows and columns, made and found: what the recipes that put images side by side return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.results import Result

__all__ = ["Gallery"]


@dataclass(frozen=True, eq=False)
class Gallery(Result):
    """Pictures `[R, K, 3, H, W]` in [0, 1], each with a name for its row and for its column.

    values: `[R, K]`, what the row's target gives for the picture, NaN where that says nothing. indices: `[R, K]`, which
    image of the data set it is, -1 for one that was made. raw: the numbers behind drawings of what is no image.
    diagnostics: what the recipe knows besides.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_visualization"

    images: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor
    indices: Tensor
    raw: Tensor | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, row: str | int, column: str | int) -> Tensor:
        """`[3, H, W]`: one of them, by name or number."""
        return self.images[_place(row, self.rows, "row"), _place(column, self.columns, "column")]


def _place(name: str | int, names: tuple[str, ...], kind: str) -> int:
    if isinstance(name, int):
        return range(len(names))[name]
    if name not in names:
        raise BadInput(f"no {kind} {name!r}; there are {', '.join(names)}")
    return names.index(name)
