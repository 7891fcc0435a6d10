"""The images and patches of a data set that move units most: what `examples` returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.results import Result

__all__ = ["Examples"]

Crops = list[list[Tensor | None]]


@dataclass(frozen=True, eq=False)
class Examples(Result):
    """For each of U units the k images or patches that the ranking put first.

    units: the target of each row; asked: the one it was asked with, as a layer for its channels. scores: `[U, k]`, the
    unit's value there. indices: `[U, k]`, of images in the data set, -1 where it has no more. positions: `[U, k, 2]`,
    row and column in the unit's map, -1 if it has one value for an image. boxes: `[U, k, 4]`, the receptive field of
    the position as far as it lies in the image, (top, left, bottom, right) in pixels of the model's input; the whole
    image where there is no position. outside: `[U, k, 4]`, pixels of the field cut off at each of the four sides.
    points: `[U, k, 2]`, the pixel in the middle of the position. sizes: `[U, k, 2]`, (H, W) of the images. labels:
    `[U, k]`, where the data set has them, else -1.

    crop: "patch" or "image", what a crop shows. band: what was asked for; bands: that of each column of a spectrum.
    images: how many were searched; skipped: which could not be read, and why. names: of the images found, by index.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_examples"

    units: tuple[str, ...]
    asked: tuple[str, ...]
    scores: Tensor
    indices: Tensor
    positions: Tensor
    boxes: Tensor
    outside: Tensor
    points: Tensor
    sizes: Tensor
    labels: Tensor
    crop: str
    band: str
    bands: tuple[str, ...]
    images: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    pixels: Tensor | None = None  # in a result that was saved: of all crops, one after another, or of all images found
    data: DataSet | None = None

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, unit: int) -> Examples:
        """The examples of one unit."""
        return self.only([range(len(self))[unit]])

    def __iter__(self) -> Iterator[Examples]:
        return (self[unit] for unit in range(len(self)))

    def only(self, rows: Sequence[int]) -> Examples:
        """The examples of some units, by their place in `units`."""
        tensors = ("scores", "indices", "positions", "boxes", "outside", "points", "sizes", "labels")
        chosen = {name: getattr(self, name)[list(rows)] for name in tensors}
        units, asked = (tuple(texts[row] for row in rows) for texts in (self.units, self.asked))
        found = replace(self, units=units, asked=asked, pixels=None, **chosen)
        return found if self.pixels is None else replace(found, pixels=found._packed(self._pictures()))

    @cached_property
    def crops(self) -> Crops:
        """`[U][k]` pictures `[3, h, w]` in [0, 1], None where the data set has no more; opened when first asked for.

        The patch in `boxes`, or with crop="image" the whole image. Each image found is read once more. Raises
        `BadInput` if one can no longer be read, or where a result was saved without its crops.
        """
        crops: Crops = [[None] * self.indices.shape[1] for _ in self.units]
        for row, column, crop in self._cut(self._pictures()):
            crops[row][column] = crop.clone() if self._as_crops else crop  # a view keeps its whole image
        return crops

    @property
    def shown(self) -> Tensor:
        """`[U, k, 4]`: what of its image each crop shows."""
        if self.crop == "patch":
            return self.boxes
        return torch.cat([torch.zeros_like(self.sizes), self.sizes], -1)

    def name(self, index: int) -> str:
        """What to call an image found: its file, or its index."""
        return self.names.get(str(index), f"image {index}")

    def save(self, path: str | os.PathLike[str], *, crops: bool = True) -> Path:
        """As every result, with the pictures found; crops=False leaves them out of the file, for good."""
        pixels = self._packed(self._pictures()) if crops else None
        return super(Examples, replace(self, data=None, pixels=pixels)).save(path)

    @property
    def _found(self) -> list[int]:
        """Every image found, once."""
        return sorted(set(self.indices[self.indices >= 0].tolist()))

    def _pictures(self) -> Iterator[tuple[int, Tensor]]:
        """Every image found, once, as it is shown; of a saved result perhaps only what its crops show of it."""
        if self.pixels is not None:
            yield from self._unpacked(self.pixels)
            return
        if self.data is None:
            raise BadInput("this result was saved without its crops, so it has no pictures to show")
        for sample in self.data.read_each(self._found):
            if sample.inputs is None:
                raise BadInput(f"{self.data.name(sample.index)} was read before and cannot be now: {sample.error}")
            yield sample.index, self.data.spec.display(sample.inputs[None])[0]

    def _cut(self, pictures: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, int, Tensor]]:
        """The row, the column and the pixels of each crop, image by image."""
        for index, picture in pictures:
            for row, column in (self.indices == index).nonzero().tolist():
                top, left, bottom, right = self.shown[row, column].tolist()
                yield row, column, picture[:, top:bottom, left:right]

    def _packed(self, pictures: Iterator[tuple[int, Tensor]]) -> Tensor:
        """As bytes, one after another, all crops or all images found, whichever takes less."""
        wanted = set(self._found)
        pictures = ((index, picture) for index, picture in pictures if index in wanted)
        parts = (crop for *_, crop in self._cut(pictures)) if self._as_crops else (picture for _, picture in pictures)
        packed = [(part * 255).round().byte().flatten() for part in parts]
        return torch.cat(packed) if packed else torch.empty(0, dtype=torch.uint8)

    def _unpacked(self, pixels: Tensor) -> Iterator[tuple[int, Tensor]]:
        begin = 0
        for index in self._found:
            cells = (self.indices == index).nonzero().tolist()
            height, width = self.sizes[tuple(cells[0])].tolist()
            boxes = (
                [self.shown[row, column].tolist() for row, column in cells]
                if self._as_crops
                else [[0, 0, height, width]]
            )
            picture = torch.zeros(3, height, width)
            for top, left, bottom, right in boxes:
                end = begin + 3 * (bottom - top) * (right - left)
                picture[:, top:bottom, left:right] = pixels[begin:end].view(3, bottom - top, right - left).float() / 255
                begin = end
            yield index, picture

    @cached_property
    def _as_crops(self) -> bool:
        """Whether the crops together are smaller than the images they are of."""
        there = self.indices >= 0
        shown = self.shown[there]
        crops = ((shown[:, 2] - shown[:, 0]) * (shown[:, 3] - shown[:, 1])).sum()
        first = {index: place for place, index in reversed(list(enumerate(self.indices[there].tolist())))}
        return bool(crops < self.sizes[there][list(first.values())].prod(1).sum())
