"""One pass over a data set that feeds any number of streaming statistics.

    found = scan(handle, data, {"layer4": [Top(9), Moments()], "layer3": [Top(9)]})

Each batch costs one forward pass, stopped after the last layer asked for. A statistic looks at its layer's map while
the pass is there; nothing of the map is kept. It takes in what it saw when the pass has come to its end, so that one
that runs out of memory counts for nothing and is asked again, of fewer images. Targets that read several layers or the
output are asked when the pass is over, as `Joint`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet, Sample, batches
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle, Reading, Shape
from torchloupe_core.images import finite
from torchloupe_core.layout import to_map
from torchloupe_core.pace import Pace
from torchloupe_core.statistics import Statistic
from torchloupe_core.targets import Bound, Target

__all__ = ["Joint", "Scanned", "scan"]

Report = Callable[[int, int], None]
ENDLESS = 2**62  # how long a stream may be


@dataclass(frozen=True)
class Joint:
    """T targets, and the statistics of their values as maps `[N, T, 1, 1]`; a unit counts where it is largest."""

    targets: Sequence[Target] = ()
    statistics: Sequence[Statistic] = ()


@dataclass
class Scanned:
    """What a pass came across: how many images, their labels where known, and what could not be read, with why.

    shape: of the first image, as model input; others: of those whose shape differs from it.
    """

    images: int = 0
    labels: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    shape: Shape | None = None
    others: dict[int, Shape] = field(default_factory=dict)

    def took(self, indices: Sequence[int], shape: Shape) -> None:
        """Counts images that went through the model."""
        self.images += len(indices)
        self.shape = self.shape or shape
        if shape != self.shape:
            self.others.update(dict.fromkeys(indices, shape))

    def merge(self, other: Scanned, indices: Sequence[int]) -> None:
        """Takes in what a later part of the data set, these images, came to."""
        seen = [index for index in indices if index not in other.skipped] if other.shape else []
        alike = [index for index in seen if index not in other.others]
        if other.shape is not None:
            self.took(alike, other.shape)
        for index, shape in other.others.items():
            self.took([index], shape)
        self.labels |= other.labels
        self.skipped |= other.skipped

    def shape_of(self, index: int) -> Shape:
        """(C, H, W) of an image that went through the model."""
        if self.shape is None:
            raise BadInput("no image was seen")
        return self.others.get(index, self.shape)


def scan(
    handle: Handle,
    data: DataSet,
    statistics: Mapping[str, Sequence[Statistic]],
    *,
    joint: Joint | None = None,
    store: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    resume: bool = True,
    batch_size: int | None = None,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: Report = lambda done, total: None,
) -> Scanned:
    """Sends every image through the model once and shows each layer's map to the statistics under its name.

    joint: targets that are asked of the whole pass. store: a folder that keeps what is done, so that a scan that was
    killed goes on, and the ranks of a run share it; engine: "ray" spreads it; with resume as in `scan_stored`.
    batch_size: found while working unless given; halved where memory ends, but for a store. workers: processes that
    read images. autocast: the type to compute in, as `torch.bfloat16`. skip_failures: images that cannot be read are
    noted and left out; otherwise the first one raises `BadInput`. Raises `BadInput` if no image can be read.
    """
    begun, found = time.perf_counter(), Scanned()
    if not statistics and joint is None:
        raise BadInput("no layer was named, so there is nothing to look at")
    how: Any = {"batch_size": batch_size, "workers": workers, "autocast": autocast, "skip_failures": skip_failures}
    if store is not None or engine is not None:
        from torchloupe_core.filling import scan_stored  # which builds on this file

        kept: Any = {"store": store, "engine": engine, "resume": resume}
        return scan_stored(handle, data, statistics, joint=joint, progress=progress, **kept, **how)
    pace, asked = beginning(handle, data, batch_size), Pass(handle, data, statistics, joint)
    with (
        contextlib.closing(batches(data, max(1, pace.size // 2), workers)) as parts,
        handle.borrow(),
        computing(handle, autocast),
    ):
        asked.go_through(parts, data.length, pace, found, skip_failures=skip_failures, progress=progress)
    found.seconds = time.perf_counter() - begun
    require_images(found)
    return found


class _AllRead(Exception):
    """There are no more samples."""


class _Reader:
    """Samples by their place in the pass, read ahead; those of a batch that is asked for again are still there."""

    def __init__(self, data: DataSet, parts: Iterator[list[Sample]], found: Scanned, skip_failures: bool) -> None:
        self.data, self.parts, self.found, self.skip_failures = data, parts, found, skip_failures
        self.first, self.held = 0, []  # type: int, list[Sample]
        self.taken = 0  # how many there were when last asked
        self.broken: Exception | None = None

    def take(self, start: int, stop: int) -> list[Sample]:
        """The samples from `start` to `stop` that could be read. Raises `_AllRead` after the last."""
        self.held, self.first = self.held[start - self.first :], start
        while len(self.held) < stop - start and (part := self._next()) is not None:
            self.held += [self._noted(sample) for sample in part]
        self.taken = min(len(self.held), stop - start)
        if not self.held:
            raise _AllRead
        return [sample for sample in self.held[: stop - start] if sample.inputs is not None]

    def _next(self) -> list[Sample] | None:
        if self.broken is not None:  # memory that ends here does not end the data set
            raise self.broken
        try:
            return next(self.parts, None)
        except Exception as error:
            self.broken = error
            raise

    def _noted(self, sample: Sample) -> Sample:
        if sample.error is not None:
            if not self.skip_failures:
                name = self.data.name(sample.index)
                raise BadInput(sample.error if name in sample.error else f"{name}: {sample.error}")
            self.found.skipped[sample.index] = sample.error
        if sample.label is not None:
            self.found.labels[sample.index] = sample.label
        return sample


Looked = list[tuple[Statistic, Any]]


class Pass:
    """What is asked of each batch."""

    def __init__(
        self, handle: Handle, data: DataSet, statistics: Mapping[str, Sequence[Statistic]], joint: Joint | None
    ) -> None:
        self.handle, self.data, self.statistics, self.joint = handle, data, statistics, joint or Joint()
        self.bound: dict[Shape, list[Bound]] = {}

    def go_through(
        self,
        parts: Iterator[list[Sample]],
        total: int | None,
        pace: Pace,
        found: Scanned,
        *,
        skip_failures: bool,
        progress: Report,
    ) -> None:
        """Shows the statistics all samples that are read; of how many is known unless they are a stream."""
        reader = _Reader(self.data, parts, found, skip_failures)
        with contextlib.suppress(_AllRead):
            for start, _, seen in pace.run(total or ENDLESS, lambda start, stop: self.look(reader.take(start, stop))):
                for shape, indices, looked in seen:
                    found.took(indices.tolist(), shape)
                    for statistic, what in looked:
                        statistic.update(what, indices)
                progress(start + reader.taken, total or start + reader.taken)

    def look(self, samples: Sequence[Sample]) -> list[tuple[Shape, Tensor, Looked]]:
        """One forward pass for each size of image among the samples: that, their indices, and what was seen of them."""
        seen = []
        for shape, group in _by_shape(samples).items():
            inputs = torch.stack([sample.inputs for sample in group if sample.inputs is not None])
            indices = torch.tensor([sample.index for sample in group])
            looked = self._forward(inputs.to(self.handle.device, self.handle.dtype), shape, indices)
            seen.append((shape, indices, looked))
        return seen

    def _forward(self, inputs: Tensor, shape: Shape, indices: Tensor) -> Looked:
        """What each statistic saw of a batch of images of one size."""
        looked: Looked = []
        exchange = {layer: self._looking(layer, shape, indices, looked) for layer in self.statistics}
        layers = dict.fromkeys(name for target in self.joint.targets for name in target.layers)
        through = any(target.reads_output for target in self.joint.targets)
        with self.handle.watch(*layers, through=through, shape=shape, exchange=exchange) as watch:
            reading = Reading(self.handle, watch, watch(inputs))
        if self.joint.targets:
            values = torch.stack([one.read(reading, "max") for one in self._bound(inputs, shape)], 1)
            self._require_finite(values, "a target", indices)
            looked.extend((one, one.look(values[:, :, None, None], indices)) for one in self.joint.statistics)
        return looked

    def _looking(self, layer: str, shape: Shape, indices: Tensor, looked: Looked) -> Callable[[Tensor], Tensor]:
        layout = self.handle.layer(layer, shape).layout
        if layout is None:
            raise BadInput(f"layer {layer!r} gives no map of channels at inputs of {list(shape)}")

        def look(activation: Tensor) -> Tensor:
            maps = to_map(activation, layout)
            self._require_finite(maps, f"layer {layer!r}", indices)
            looked.extend((statistic, statistic.look(maps, indices)) for statistic in self.statistics[layer])
            return activation

        return look

    def _bound(self, inputs: Tensor, shape: Shape) -> list[Bound]:
        if shape not in self.bound:
            self.bound[shape] = [self.handle.bind(target, inputs[:1])[0] for target in self.joint.targets]
        return self.bound[shape]

    def _require_finite(self, values: Tensor, what: str, indices: Tensor) -> None:
        if not finite(values):
            bad = (~values.flatten(1).isfinite().all(1)).nonzero()[0, 0]
            raise BadInput(f"{what} holds NaN or infinity for {self.data.name(int(indices[bad]))}")


def _by_shape(samples: Sequence[Sample]) -> dict[Shape, list[Sample]]:
    groups: dict[Shape, list[Sample]] = {}
    for sample in samples:
        if sample.inputs is not None:
            channels, height, width = sample.inputs.shape
            groups.setdefault((channels, height, width), []).append(sample)
    return groups


def beginning(handle: Handle, data: DataSet, batch_size: int | None) -> Pace:
    """The pace of a pass: the size given or stated by a loader, or else found while working."""
    given = data.batch_size if batch_size is None else batch_size
    if given is not None:
        if given < 1:
            raise BadInput(f"batch_size is at least 1; got {given}")
        return Pace(given, settled=True)
    return handle.pace(handle.spec.input_size or (3, 224, 224))


def computing(handle: Handle, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, the model computes in that type where it loses little."""
    if autocast is None:
        return contextlib.nullcontext()
    if autocast not in (torch.bfloat16, torch.float16) or handle.dtype == torch.float64:
        raise BadInput(
            "autocast is torch.bfloat16 or torch.float16, for a model that is not in float64; "
            f"got {autocast} for one in {handle.dtype}"
        )
    return torch.autocast(handle.device.type, autocast)


def require_images(found: Scanned) -> None:
    """Raises `BadInput` if no image went through the model."""
    if found.images:
        return
    if not found.skipped:
        raise BadInput("the data set is empty")
    first = next(iter(found.skipped.values()))
    raise BadInput(f"none of the {len(found.skipped)} images could be read; the first: {first}")
