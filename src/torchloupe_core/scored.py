"""Every image of a data set with the value of each of several targets."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.dataset import DataSet, Sample, batches
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle, Reading
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
        indices = self.indices[places.flatten()].tolist()
        samples = self.data.read_many(indices)
        found = []
        for index in indices:
            inputs = samples[index].inputs
            if inputs is None:
                raise BadInput(f"{self.data.name(index)} could be read before and cannot any more")
            found.append(_sized(self.data.spec.display(inputs[None]), size))
        return torch.cat(found).view(*places.shape, 3, *size)


def score_data(handle: Handle, data: DataSet, targets: Sequence[Target], *, batch_size: int | None = None) -> Scored:
    """One pass over the data set, stopping after the last layer read. Raises `BadInput` if no image can be read."""
    indices: list[int] = []
    scores: list[Tensor] = []
    skipped: dict[int, str] = {}
    with handle.borrow(), contextlib.closing(batches(data, batch_size or 8, None)) as parts:
        for part in parts:
            for sample in part:
                if sample.inputs is None:
                    skipped[sample.index] = sample.error or "cannot be read"
            for same in _of_one_shape(part):
                indices += [sample.index for sample in same]
                scores.append(_scores(handle, same, targets))
    if not indices:
        raise BadInput(f"no image of the data set can be read; the first says: {next(iter(skipped.values()), 'empty')}")
    order = torch.tensor(indices).argsort()
    return Scored(data, torch.tensor(indices)[order], torch.cat(scores)[order], skipped)


def _scores(handle: Handle, samples: Sequence[Sample], targets: Sequence[Target]) -> Tensor:
    """`[N, T]`."""
    inputs = torch.stack([one.inputs for one in samples if one.inputs is not None]).to(handle.device, handle.dtype)
    shape = (inputs.shape[1], inputs.shape[2], inputs.shape[3])
    bounds = [handle.bind(one, inputs[:1])[0] for one in targets]
    names = dict.fromkeys(name for one in targets for name in one.layers)
    with handle.watch(*names, through=any(one.reads_output for one in targets), shape=shape) as watch:
        reading = Reading(handle, watch, watch(inputs))
        return torch.stack([bound.read(reading) for bound in bounds], 1).float().cpu()


def _of_one_shape(samples: Sequence[Sample]) -> list[list[Sample]]:
    found: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        if sample.inputs is not None:
            found.setdefault(tuple(sample.inputs.shape), []).append(sample)
    return list(found.values())


def _sized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
