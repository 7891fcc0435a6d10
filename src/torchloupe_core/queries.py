"""What is searched for: images of any kind, or images of the data set itself, by number."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.features import FeatureSet

__all__ = ["Query"]


@dataclass(frozen=True)
class Query:
    """Queries: `images` of any kind, or else `numbers` of images of the data set.

    excludes: whether each, itself in the data set, is left out.
    """

    images: Any
    numbers: tuple[int, ...] | None
    excludes: bool

    @classmethod
    def of(cls, given: Any, exclude_self: bool | None) -> Query:
        """What a user gave. Queries by number are left out unless told otherwise, images are not."""
        numbers = _numbers(given)
        excludes = numbers is not None if exclude_self is None else exclude_self
        return cls(_listed(given) if numbers is None else None, numbers, excludes)

    def rows(self, indices: Sequence[int], skipped: Mapping[int, str]) -> list[int]:
        """Where among the indices of a data set the numbers are. Raises `BadInput` for one that is not there."""
        places = {index: row for row, index in enumerate(indices)}
        for number in self.numbers or ():
            if number in skipped:
                raise BadInput(f"image {number} of the data set could not be read: {skipped[number]}")
            if number not in places:
                raise BadInput(f"there is no image {number} in the data set of {len(indices)} images")
        return [places[number] for number in self.numbers or ()]

    def left_out(self, queries: FeatureSet, files: Sequence[str] | None, own: Sequence[int]) -> Tensor:
        """For each query the number that does not count, -1 for none: its `own`, or that of the same file."""
        if not self.excludes:
            return torch.full((len(queries),), -1)
        if self.numbers is not None:
            return torch.tensor(own)
        if queries.names is None or files is None:
            raise BadInput(
                "exclude_self leaves out queries given by number or by file; "
                "these images have neither, so nothing says which of the data set they are"
            )
        places = {Path(name).resolve(): number for number, name in enumerate(files)}
        return torch.tensor([places.get(Path(name).resolve(), -1) for name in queries.names])


def _numbers(given: Any) -> tuple[int, ...] | None:
    """The numbers of images, None for images themselves."""
    if isinstance(given, (Tensor, np.ndarray)):
        whole = given.ndim <= 1 and str(given.dtype).removeprefix("torch.") in ("int64", "int32")
        given = given.tolist() if whole else None
    listed = [given] if _whole(given) else given
    if isinstance(listed, (list, tuple, range)) and len(listed) and all(map(_whole, listed)):
        return tuple(map(operator.index, listed))
    return None


def _whole(one: Any) -> bool:
    return isinstance(one, (int, np.integer)) and not isinstance(one, bool)


def _listed(given: Any) -> Any:
    """One image as a list of one; all else is a data set already."""
    single = isinstance(given, Image.Image) or (isinstance(given, (Tensor, np.ndarray)) and given.ndim in (2, 3))
    return [given] if single else given
