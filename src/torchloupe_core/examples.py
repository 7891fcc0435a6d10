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
    pixels: Tensor | None = None  # of all crops, one after another, in a result that was saved
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
        kept = None if self.pixels is None else _packed([self.crops[row] for row in rows])
        chosen = {name: getattr(self, name)[list(rows)] for name in tensors}
        units, asked = (tuple(texts[row] for row in rows) for texts in (self.units, self.asked))
        return replace(self, units=units, asked=asked, pixels=kept, **chosen)

    @cached_property
    def crops(self) -> Crops:
        """`[U][k]` pictures `[3, h, w]` in [0, 1], None where the data set has no more; opened when first asked for.

        The patch in `boxes`, or with crop="image" the whole image. Each image found is read once more. Raises
        `BadInput` if one can no longer be read, or where a result was saved without its crops.
        """
        if self.pixels is not None:
            return self._unpacked(self.pixels)
        crops: Crops = [[None] * self.indices.shape[1] for _ in self.units]
        for index, picture in self._pictures():
            for row, column in (self.indices == index).nonzero().tolist():
                top, left, bottom, right = self.shown[row, column].tolist()
                crops[row][column] = picture[:, top:bottom, left:right].clone()
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
        """As every result; crops=False leaves out the pictures, which are then not there when it is opened again."""
        pixels = _packed(self.crops) if crops else None
        return super(Examples, replace(self, data=None, pixels=pixels)).save(path)

    def _pictures(self) -> Iterator[tuple[int, Tensor]]:
        """Every image found, once, as it is shown."""
        if self.data is None:
            raise BadInput("this result was saved without its crops, so it has no pictures to show")
        wanted = sorted(set(self.indices[self.indices >= 0].tolist()))
        for sample in self.data.read_each(wanted):
            if sample.inputs is None:
                raise BadInput(f"{self.data.name(sample.index)} was read before and cannot be now: {sample.error}")
            yield sample.index, self.data.spec.display(sample.inputs[None])[0]

    def _unpacked(self, pixels: Tensor) -> Crops:
        crops: Crops = [[None] * self.indices.shape[1] for _ in self.units]
        begin = 0
        for row, column in (self.indices >= 0).nonzero().tolist():
            top, left, bottom, right = self.shown[row, column].tolist()
            shape = (3, bottom - top, right - left)
            end = begin + shape[0] * shape[1] * shape[2]
            crops[row][column] = pixels[begin:end].view(shape).float() / 255
            begin = end
        return crops


def _packed(crops: Crops) -> Tensor:
    """All crops as bytes, one after another."""
    parts = [(crop * 255).round().byte().flatten() for row in crops for crop in row if crop is not None]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
