"""Every image of a data set with the value of each of several targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.scan import Joint, scan
from torchloupe_core.statistics import Features
from torchloupe_core.targets import Target

__all__ = ["Scored", "score_data"]


@dataclass(frozen=True)
class Scored:
    """indices `[M]` of the images that could be read, scores `[M, T]`; skipped: why the others could not."""

    data: DataSet
    indices: Tensor
    scores: Tensor
    skipped: dict[int, str]

    def at(self, target: int, shares: Sequence[float]) -> Tensor:
        """The places in `indices` of the images at these shares of the way from the lowest score to the highest."""
        order = self.scores[:, target].argsort(stable=True)
        return torch.stack([order[round(share * (len(order) - 1))] for share in shares])

    def pictures(self, places: Tensor, size: tuple[int, int]) -> Tensor:
        """`[*places, 3, H, W]` in [0, 1]: the images at these places of `indices`, in one size."""
        indices, found = self.indices[places.flatten()].tolist(), {}
        for sample in self.data.read_each(indices):
            if sample.inputs is None:
                raise BadInput(f"{self.data.name(sample.index)} could be read before and cannot any more")
            found[sample.index] = _sized(self.data.spec.display(sample.inputs[None]), size)
        return torch.cat([found[index] for index in indices]).view(*places.shape, 3, *size)


def score_data(handle: Handle, data: DataSet, targets: Sequence[Target], *, batch_size: int | None = None) -> Scored:
    """One pass over the data set; of maps the largest value counts. Raises `BadInput` if no image can be read."""
    values = Features()
    found = scan(handle, data, {}, joint=Joint(targets, [values]), batch_size=batch_size)
    return Scored(data, *values.compute(), found.skipped)


def _sized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
