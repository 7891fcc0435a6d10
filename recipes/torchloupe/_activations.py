"""The feature maps of images, and where they are strong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.activations import Activations, Threshold, quantiles_over, thresholds
from torchloupe_core.channels import select
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.pace import Pace

__all__ = ["activations"]


def activations(
    model: ModelLike,
    images: Any,
    layer: object,
    *,
    channels: Sequence[int] | int | None = None,
    threshold: Threshold | None = None,
    over: Any = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Activations:
    """What the channels of a layer give for images, as maps `[N, C, h, w]` whatever the model's own order.

    channels: those wanted, all unless given. threshold: makes `.masks`, the pixels where a map, enlarged to the image,
    exceeds it: a value, as `0.5`; a quantile of each channel over these images, as `"99%"`; a value for each channel.
    over: a data set, as `examples` takes it, that the quantile is taken over instead.
    """
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"batch_size is at least 1; got {batch_size}")
    handle = opened(model, device=device, dtype=dtype)
    inputs = handle.inputs(images)
    shape = (inputs.shape[1], inputs.shape[2], inputs.shape[3])
    begun, forwards = time.perf_counter(), handle.forwards
    found = handle.layer(layer, shape)
    if found.layout is None:
        raise NotApplicable(f"layer {str(layer)!r} ({found.kind}) gives no map of channels")
    if threshold is not None and not found.spatial:
        raise NotApplicable(f"layer {str(layer)!r} ({found.kind}) has one position, so no threshold can say where")
    if over is not None and threshold is None:
        raise BadInput('over= is a data set for a quantile, and no threshold was given, as "99%"')
    chosen = select(channels, found.layout.channels, str(layer))
    scanned = None if over is None else _over(handle, over, str(layer), threshold, batch_size, progress)
    pace = handle.pace(shape) if batch_size is None else Pace(batch_size, settled=True)
    with progress_bar("activations", "images", progress) as report, handle.borrow():
        parts = []
        for _, done, maps in pace.run(
            len(inputs), lambda start, stop: _maps(handle, inputs[start:stop], layer, chosen)
        ):
            parts.append(maps)
            report(done, len(inputs))
    maps = torch.cat(parts)
    if not maps.isfinite().all():
        raise BadInput(f"layer {str(layer)!r} gives NaN or infinity for these images")
    values, words = None, ""
    if threshold is not None:
        asked, said = scanned or (threshold, "")
        values, words = thresholds(maps, asked, chosen, found.layout.channels)
        words = said or words
    return Activations(
        method="activations",
        backend="native",
        seed=0,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(),
        options={},
        maps=maps,
        images=handle.spec.display(inputs),
        layer=str(layer),
        channels=tuple(chosen),
        thresholds=values,
        threshold=words,
    )


def _over(
    handle: Handle, over: Any, layer: str, threshold: Any, batch_size: int | None, progress: bool | None
) -> tuple[Tensor, str]:
    data = open_data(over, handle.spec)
    with progress_bar("quantiles", "images", progress) as report:
        return quantiles_over(handle, data, layer, threshold, batch_size=batch_size, progress=report)


def _maps(handle: Handle, inputs: Tensor, layer: object, channels: Sequence[int]) -> Tensor:
    shape = (inputs.shape[1], inputs.shape[2], inputs.shape[3])
    with handle.watch(layer, shape=shape) as watch:
        watch(inputs)
        return watch.map(layer)[:, channels].float().cpu()
