"""One pass over a data set that feeds any number of streaming statistics.

    found = scan(handle, data, {"layer4": [Top(9), Moments()], "layer3": [Top(9)]})

Each batch costs one forward pass, stopped after the last layer asked for. A statistic looks at its layer's map while
the pass is there; nothing of the map is kept.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet, Sample, batches
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.layout import to_map
from torchloupe_core.pace import Pace
from torchloupe_core.statistics import Statistic

__all__ = ["Scanned", "scan"]

Report = Callable[[int, int], None]
ENDLESS = 2**62  # how long a stream may be


@dataclass
class Scanned:
    """What a pass came across: how many images, their labels where known, and what could not be read, with why."""

    images: int = 0
    labels: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0


def scan(
    handle: Handle,
    data: DataSet,
    statistics: Mapping[str, Sequence[Statistic]],
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: Report = lambda done, total: None,
) -> Scanned:
    """Sends every image through the model once and shows each layer's map to the statistics under its name.

    batch_size: found while working unless given; halved where memory ends. workers: processes that read images.
    autocast: the type to compute in, as `torch.bfloat16`. skip_failures: images that cannot be read are noted and left
    out; otherwise the first one raises `BadInput`. Raises `BadInput` if no image can be read.
    """
    begun, found = time.perf_counter(), Scanned()
    pace = _pace(handle, data, batch_size)
    reader = _Reader(data, batches(data, max(1, pace.size // 2), workers), found, skip_failures)
    total = data.length or ENDLESS
    computing = torch.autocast(handle.device.type, autocast) if autocast is not None else contextlib.nullcontext()
    with handle.borrow(), computing:
        for _, done, samples in pace.run(
            total, lambda start, stop: _look(handle, statistics, reader.take(start, stop))
        ):
            progress(min(done, data.length or done), data.length or done)
            if samples is None:
                break
            found.images += samples
    found.seconds = time.perf_counter() - begun
    if not found.images:
        raise BadInput(_nothing_read(found))
    return found


class _Reader:
    """Samples by their place in the pass, read ahead; those of a batch that is asked for again are still there."""

    def __init__(self, data: DataSet, parts: Iterator[list[Sample]], found: Scanned, skip_failures: bool) -> None:
        self.data, self.parts, self.found, self.skip_failures = data, parts, found, skip_failures
        self.first, self.held = 0, []  # type: int, list[Sample]

    def take(self, start: int, stop: int) -> list[Sample] | None:
        """The samples from `start` to `stop` that could be read; None after the last."""
        self.held, self.first = self.held[start - self.first :], start
        while len(self.held) < stop - start:
            part = next(self.parts, None)
            if part is None:
                break
            self.held += [self._noted(sample) for sample in part]
        if not self.held:
            return None
        return [sample for sample in self.held[: stop - start] if sample.inputs is not None]

    def _noted(self, sample: Sample) -> Sample:
        if sample.error is not None:
            if not self.skip_failures:
                raise BadInput(f"{self.data.name(sample.index)}: {sample.error}")
            self.found.skipped[sample.index] = sample.error
        if sample.label is not None:
            self.found.labels[sample.index] = sample.label
        return sample


def _look(handle: Handle, statistics: Mapping[str, Sequence[Statistic]], samples: list[Sample] | None) -> int | None:
    """One forward pass for each size of image among the samples; the statistics take it in when all went well."""
    if samples is None:
        return None
    seen = []
    for shape, group in _by_shape(samples).items():
        looked: list[tuple[Statistic, Any]] = []
        inputs = torch.stack([sample.inputs for sample in group if sample.inputs is not None])
        _forward(handle, statistics, inputs.to(handle.device, handle.dtype), shape, looked)
        seen.append((torch.tensor([sample.index for sample in group]), looked))
    for indices, looked in seen:
        for statistic, what in looked:
            statistic.update(what, indices)
    return len(samples)


def _forward(
    handle: Handle,
    statistics: Mapping[str, Sequence[Statistic]],
    inputs: Tensor,
    shape: Shape,
    looked: list[tuple[Statistic, Any]],
) -> None:
    def looking(layer: str) -> Callable[[Tensor], Tensor]:
        layout = handle.layer(layer, shape).layout
        if layout is None:
            raise BadInput(f"layer {layer!r} gives no map of channels at inputs of {list(shape)}")

        def look(activation: Tensor) -> Tensor:
            maps = to_map(activation, layout)
            if not bool(maps.sum(dtype=torch.float32).isfinite()):  # one number, where a mask is as large as the map
                raise BadInput(f"layer {layer!r} holds NaN or infinity for an image of the data set")
            looked.extend((statistic, statistic.look(maps)) for statistic in statistics[layer])
            return activation

        return look

    with handle.watch(shape=shape, exchange={layer: looking(layer) for layer in statistics}) as watch:
        watch(inputs)


def _by_shape(samples: Sequence[Sample]) -> dict[Shape, list[Sample]]:
    groups: dict[Shape, list[Sample]] = {}
    for sample in samples:
        if sample.inputs is not None:
            channels, height, width = sample.inputs.shape
            groups.setdefault((channels, height, width), []).append(sample)
    return groups


def _pace(handle: Handle, data: DataSet, batch_size: int | None) -> Pace:
    given = batch_size or data.batch_size
    if given is not None:
        if given < 1:
            raise BadInput(f"batch_size is at least 1; got {given}")
        return Pace(given, settled=True)
    return handle.pace(handle.spec.input_size or (3, 224, 224))


def _nothing_read(found: Scanned) -> str:
    if not found.skipped:
        return "the data set is empty"
    first = next(iter(found.skipped.values()))
    return f"none of the {len(found.skipped)} images could be read; the first: {first}"
