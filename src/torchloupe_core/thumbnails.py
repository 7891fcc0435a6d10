"""Small pictures of the images of a data set, read when a drawing wants them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchloupe_core.dataset import DataSet, batches
from torchloupe_core.errors import BadInput
from torchloupe_core.images import open_picture
from torchloupe_core.spec import Spec

__all__ = ["Pictured", "natural_size", "small", "thumbnails"]

AT_ONCE = 64
MISSING = 200  # the grey of a picture that cannot be read any more


class Pictured(Protocol):
    """A result about images: where they can be read again."""

    @property
    def indices(self) -> Tensor: ...
    @property
    def names(self) -> tuple[str, ...] | None: ...
    @property
    def pictures(self) -> Tensor | None: ...
    @property
    def data(self) -> DataSet | None: ...


def thumbnails(found: Pictured, rows: Tensor, size: int, report: Callable[[int, int], None]) -> Tensor:
    """`[R, 3, size, size]` uint8: of the images in some rows of a result, whole, on white where they are not square.

    From pictures that were kept, else the data set, where they are what the model was shown, else the files by name.
    """
    if size < 1:
        raise BadInput(f"a small picture is at least 1 pixel wide; got {size}")
    if found.pictures is not None:
        kept = found.pictures[rows]
        return kept if kept.shape[2] == size else torch.stack([_fitted(_opened(one), size) for one in kept])
    if found.data is not None:
        reading = _from_data(found.data, found.indices[rows].tolist(), size)
    elif found.names is not None:
        reading = _from_files([found.names[row] for row in rows.tolist()], size)
    else:
        raise BadInput(
            "the images of this result are not at hand: they were no files; "
            "with_pictures() before saving keeps small ones with it"
        )
    small_ones = torch.full((len(rows), 3, size, size), MISSING, dtype=torch.uint8)
    for done, (place, picture) in enumerate(reading, 1):
        small_ones[place] = picture
        report(done, len(rows))
    return small_ones


def natural_size(found: Pictured) -> int:
    """How many pixels across the images are, going by the first that can be read; small pictures need not be larger."""
    if found.pictures is not None:
        return found.pictures.shape[2]
    if found.data is not None:
        read = (found.data.read(index).inputs for index in found.indices.tolist())
        return next((max(inputs.shape[1:]) for inputs in read if inputs is not None), 1)
    for name in found.names or ():
        with contextlib.suppress(BadInput):
            return max(open_picture(name).size)
    return 1


def small(inputs: Tensor, spec: Spec, size: int) -> Tensor:
    """`[3, size, size]` uint8, of a model input `[C, H, W]`: what the model was shown."""
    shown = spec.display(inputs[None])[0]
    return _fitted(_opened((shown * 255).round().to(torch.uint8)), size)


def _from_data(data: DataSet, indices: list[int], size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Each image wanted, read once, and the places that want it."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    wanted = copy.copy(data)
    if not data.streams:
        wanted.order = sorted(places)
    with contextlib.closing(batches(wanted, AT_ONCE)) as parts:
        for part in parts:
            for sample in part:
                if sample.index in places and sample.inputs is not None:
                    yield places[sample.index], small(sample.inputs, data.spec, size)


def _from_files(names: list[str], size: int) -> Iterator[tuple[list[int], Tensor]]:
    for place, name in enumerate(names):
        with contextlib.suppress(BadInput):
            yield [place], _fitted(open_picture(Path(name)).convert("RGB"), size)


def _opened(picture: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))


def _fitted(image: Image.Image, size: int) -> Tensor:
    """Scaled to fit a square; a smaller one is enlarged by whole pixels as far as it goes."""
    across, down = image.size
    scale = size / max(across, down)
    fitted = (max(1, round(across * scale)), max(1, round(down * scale)))
    if fitted != image.size:
        image = image.resize(fitted, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
