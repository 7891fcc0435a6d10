"""Images of a data set as one batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle

__all__ = ["Batch", "read_batch", "several"]


def several(images: Any) -> Any:
    """Images as a data set, where one image may stand alone: a picture, its file, or `[C, H, W]`."""
    file = isinstance(images, (str, os.PathLike)) and Path(images).is_file()
    return [images] if file or isinstance(images, Image.Image) or getattr(images, "ndim", 4) == 3 else images


@dataclass(frozen=True)
class Batch:
    """Images that could be read, `inputs [n, C, H, W]` on the model's device and of its type.

    places: where each stands among the indices asked for; indices: what it is in the data set. skipped: the names of
    those that could not be read, with why.
    """

    inputs: Tensor
    places: Sequence[int]
    indices: Sequence[int]
    skipped: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.indices)


def read_batch(
    handle: Handle, data: DataSet, indices: Sequence[int], *, asking: str, skip_failures: bool = True
) -> Batch:
    """Images by index, in that order, as one batch, which is empty if none can be read.

    asking: what needs it, for messages, as in "an audit". Raises `BadInput` if the images are of several sizes, and if
    one cannot be read and `skip_failures` is off.
    """
    read = {sample.index: sample for sample in data.read_each(indices)}
    failed = {data.name(index): str(one.error) for index, one in read.items() if one.inputs is None}
    if failed and not skip_failures:
        name, why = next(iter(failed.items()))
        raise BadInput(f"{name}: {why}")
    found = [(place, index, one) for place, index in enumerate(indices) if (one := read[index].inputs) is not None]
    if len({one.shape for *_, one in found}) > 1:
        raise BadInput(f"the images are of several sizes; {asking} needs one, so give a model with an input size")
    inputs = torch.stack([one for *_, one in found]) if found else torch.empty(0, 0, 0, 0)
    return Batch(
        inputs.to(handle.device, handle.dtype), [place for place, *_ in found], [index for _, index, _ in found], failed
    )
