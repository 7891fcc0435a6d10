"""Masks of images, as a user may have them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput

__all__ = ["masks_of"]

WHITE = 128  # of 255, from which on a pixel is inside


def masks_of(
    masks: Any, data: DataSet, order: Sequence[int]
) -> Callable[[Sequence[int], tuple[int, int]], Tensor] | None:
    """`[n, H, W]` bool of the images of these indices, in that size; None without masks.

    masks: `[N, H, W]`, inside where it is not zero, or a folder that holds for each image file a picture of the same
    name, with any ending, white inside. Those of a folder, and of another size, are resized as the whole image is,
    so a model's preprocessing must not crop. Raises `BadInput`.
    """
    if masks is None:
        return None
    if isinstance(masks, (str, os.PathLike)):
        files = _files(Path(masks), data, order)
        return lambda chosen, size: torch.stack([_sized(_opened(files[index]), size) for index in chosen])
    given = torch.as_tensor(masks)
    if given.ndim != 3 or len(given) != len(order):
        raise BadInput(f"masks are [N, H, W], one for each of the {len(order)} images; got {list(given.shape)}")
    places = {index: place for place, index in enumerate(order)}
    return lambda chosen, size: torch.stack([_sized(given[places[index]] != 0, size) for index in chosen])


def _files(folder: Path, data: DataSet, order: Sequence[int]) -> dict[int, Path]:
    if data.names is None:
        raise BadInput("masks in a folder go with images in a folder, by name; give masks as [N, H, W]")
    if not folder.is_dir():
        raise BadInput(f"masks: {str(folder)!r} is no folder")
    by_stem = {path.stem: path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {index: by_stem.get(Path(data.names[index]).stem) for index in order}
    lacking = next((index for index, path in found.items() if path is None), None)
    if lacking is not None:
        raise BadInput(f"masks: {folder} holds no picture named {Path(data.names[lacking]).stem!r}")
    return {index: path for index, path in found.items() if path is not None}


def _opened(path: Path) -> Tensor:
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("L"))) >= WHITE
    except (OSError, ValueError) as error:
        raise BadInput(f"mask {path}: {error}") from error


def _sized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(mask.shape) == tuple(size):
        return mask
    return F.interpolate(mask[None, None].float(), size=size, mode="bilinear", antialias=True)[0, 0] >= 0.5
