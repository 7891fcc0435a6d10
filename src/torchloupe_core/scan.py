"""One pass over a data set that feeds any number of streaming statistics.

    found = scan(handle, data, {"layer4": [Top(9), Moments()], "layer3": [Top(9)]})

Each batch costs one forward pass, stopped after the last layer asked for. A statistic looks at its layer's map while
the pass is there; nothing of the map is kept. It takes in what it saw when the pass has come to its end, so that one
that runs out of memory counts for nothing and is asked again, of fewer images.
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
from torchloupe_core.images import finite
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
    if not statistics:
        raise BadInput("no layer was named, so there is nothing to look at")
    pace, total = _pace(handle, data, batch_size), data.length
    with (
        contextlib.closing(batches(data, max(1, pace.size // 2), workers)) as parts,
        handle.borrow(),
        _computing(handle, autocast),
    ):
        reader = _Reader(data, parts, found, skip_failures)
        asked = pace.run(
            total or ENDLESS, lambda start, stop: _look(handle, data, statistics, reader.take(start, stop))
        )
        with contextlib.suppress(_AllRead):
            for start, _, seen in asked:
                for indices, looked in seen:
                    found.images += len(indices)
                    for statistic, what in looked:
                        statistic.update(what, indices)
                progress(start + reader.taken, total or start + reader.taken)
    found.seconds = time.perf_counter() - begun
    if not found.images:
        raise BadInput(_nothing_read(found))
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


def _look(
    handle: Handle, data: DataSet, statistics: Mapping[str, Sequence[Statistic]], samples: Sequence[Sample]
) -> list[tuple[Tensor, Looked]]:
    """One forward pass for each size of image among the samples: the images' indices, and what was seen of them."""
    seen = []
    for shape, group in _by_shape(samples).items():
        inputs = torch.stack([sample.inputs for sample in group if sample.inputs is not None])
        names = [data.name(sample.index) for sample in group]
        looked = _forward(handle, statistics, inputs.to(handle.device, handle.dtype), shape, names)
        seen.append((torch.tensor([sample.index for sample in group]), looked))
    return seen


def _forward(
    handle: Handle, statistics: Mapping[str, Sequence[Statistic]], inputs: Tensor, shape: Shape, names: Sequence[str]
) -> Looked:
    """What each statistic saw of a batch of images of one size."""
    looked: Looked = []

    def looking(layer: str) -> Callable[[Tensor], Tensor]:
        layout = handle.layer(layer, shape).layout
        if layout is None:
            raise BadInput(f"layer {layer!r} gives no map of channels at inputs of {list(shape)}")

        def look(activation: Tensor) -> Tensor:
            maps = to_map(activation, layout)
            _require_finite(maps, f"layer {layer!r}", names)
            looked.extend((statistic, statistic.look(maps)) for statistic in statistics[layer])
            return activation

        return look

    with handle.watch(shape=shape, exchange={layer: looking(layer) for layer in statistics}) as watch:
        watch(inputs)
    return looked


def _require_finite(values: Tensor, what: str, names: Sequence[str]) -> None:
    if not finite(values):
        bad = (~values.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
        raise BadInput(f"{what} holds NaN or infinity for {names[bad[0]]}")


def _by_shape(samples: Sequence[Sample]) -> dict[Shape, list[Sample]]:
    groups: dict[Shape, list[Sample]] = {}
    for sample in samples:
        if sample.inputs is not None:
            channels, height, width = sample.inputs.shape
            groups.setdefault((channels, height, width), []).append(sample)
    return groups


def _pace(handle: Handle, data: DataSet, batch_size: int | None) -> Pace:
    given = data.batch_size if batch_size is None else batch_size
    if given is not None:
        if given < 1:
            raise BadInput(f"batch_size is at least 1; got {given}")
        return Pace(given, settled=True)
    return handle.pace(handle.spec.input_size or (3, 224, 224))


def _computing(handle: Handle, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    if autocast is None:
        return contextlib.nullcontext()
    if autocast not in (torch.bfloat16, torch.float16) or handle.dtype == torch.float64:
        raise BadInput(
            "autocast is torch.bfloat16 or torch.float16, for a model that is not in float64; "
            f"got {autocast} for one in {handle.dtype}"
        )
    return torch.autocast(handle.device.type, autocast)


def _nothing_read(found: Scanned) -> str:
    if not found.skipped:
        return "the data set is empty"
    first = next(iter(found.skipped.values()))
    return f"none of the {len(found.skipped)} images could be read; the first: {first}"
