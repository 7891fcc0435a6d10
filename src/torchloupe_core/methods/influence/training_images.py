"""Labelled images gone through again and again, always in one order, from memory where they fit in it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet, Sample, batches
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.scan import Scanned

__all__ = ["Block", "TrainingImages"]

AT_ONCE = 64  # images read at once


@dataclass(frozen=True)
class Block:
    """Images of one size, as model inputs `[B, C, H, W]` on the model's device: those from `begin` on."""

    begin: int
    inputs: Tensor

    @property
    def part(self) -> slice:
        """Which of all images they are."""
        return slice(self.begin, self.begin + len(self.inputs))


class TrainingImages:
    """The images of a data set that can be read, by rising index.

    keep: bytes of images that may be kept in memory; beyond them the data set is read anew each time. Raises `BadInput`
    if an image that was read before is no longer there.
    """

    def __init__(
        self, handle: Handle, data: DataSet, *, keep: float, workers: int | None = None, skip_failures: bool = True
    ) -> None:
        self.handle, self.data, self.workers, self.keep = handle, data, workers, keep
        self.scanned = Scanned()
        self.kept: list[Tensor] | None = []
        found: list[int] = []
        with contextlib.closing(batches(data, AT_ONCE, workers)) as parts:
            for part in parts:
                found += [sample.index for sample in part if self._noted(sample, skip_failures)]
        if not found:
            first = next(iter(self.scanned.skipped.values()), "there are none")
            raise BadInput(f"none of the images could be read; the first: {first}")
        self.indices = torch.tensor(found)

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, part: slice) -> TrainingImages:
        """Some of the images, the first of which is number 0 then."""
        found = copy.copy(self)
        found.indices = self.indices[part]
        found.kept = None if self.kept is None else self.kept[part]
        return found

    def blocks(self, most: int) -> Iterator[Block]:
        """All images in order, at most so many at once, only those of one size together."""
        held: list[Tensor] = []
        begin = 0
        for inputs in self._inputs():
            if held and (len(held) == most or inputs.shape != held[0].shape):
                yield self._block(begin, held)
                begin, held = begin + len(held), []
            held.append(inputs)
        if held:
            yield self._block(begin, held)

    def _block(self, begin: int, held: list[Tensor]) -> Block:
        return Block(begin, torch.stack(held).to(self.handle.device, self.handle.dtype))

    def _inputs(self) -> Iterator[Tensor]:
        if self.kept is not None:
            yield from self.kept
            return
        again = copy.copy(self.data)
        if not self.data.streams:
            again.order = self.indices.tolist()
        wanted = iter(self.indices.tolist())
        with contextlib.closing(batches(again, AT_ONCE, self.workers)) as parts:
            for sample in (sample for part in parts for sample in part):
                if sample.inputs is None and sample.index in self.scanned.skipped:
                    continue
                if sample.inputs is None or sample.index != next(wanted, None):
                    name, why = self.data.name(sample.index), sample.error or "it is another image"
                    raise BadInput(f"{name} was read before and cannot be now: {why}")
                yield sample.inputs

    def _noted(self, sample: Sample, skip_failures: bool) -> bool:
        """Takes in a sample; whether it can be used."""
        if sample.inputs is None:
            name = self.data.name(sample.index)
            error = sample.error or "no image"
            if not skip_failures:
                raise BadInput(error if name in error else f"{name}: {error}")
            self.scanned.skipped[sample.index] = error
            return False
        if sample.label is not None:
            self.scanned.labels[sample.index] = sample.label
        channels, height, width = sample.inputs.shape
        self.scanned.took([sample.index], (channels, height, width))
        if self.kept is not None:
            self.kept.append(sample.inputs)
            self.keep -= sample.inputs.numel() * sample.inputs.element_size()
            if self.keep < 0:
                self.kept = None
        return True
