"""A data set scanned once into a folder, for other questions to be answered from."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe_adapters.lancedb import require_installed
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import scan as passes
from torchloupe_core.dataset import DataSet, open_data
from torchloupe_core.errors import NotApplicable
from torchloupe_core.features import default_layer, first_shape
from torchloupe_core.handle import Handle
from torchloupe_core.scans import Scan
from torchloupe_core.statistics import Features, Moments, Statistic, Top
from torchloupe_core.stored import stored_features
from torchloupe_core.targets import TargetLike, as_target

__all__ = ["scan"]


def scan(
    model: ModelLike,
    dataset: Any,
    layers: Sequence[object] | str | None = None,
    *,
    store: str | os.PathLike[str],
    k: int = 9,
    scores: Sequence[TargetLike] = (),
    engine: str | None = None,
    resume: bool = True,
    batch_size: int | None = None,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: bool | None = None,
) -> Scan:
    """Sends a data set through the model once and keeps in a folder what other verbs ask of it, without another pass.

    `features`, `embed`, `neighbors` and `examples` take the folder in place of the data set. Of each layer it holds the
    mean vector of every image, the k positions where each channel is largest and smallest, and the channels' moments.
    layers: the last spatial one and what goes into the classifier, unless given. scores: targets whose value is kept
    for every image.

    A scan that was stopped in any way goes on where it was, to the last bit as if it had run through; with resume=False
    a store that holds something is an error. Under `torchrun`, or wherever RANK and WORLD_SIZE are set, the processes
    share the work out, survive one another, and each gets the whole answer. engine: "ray" spreads the work through Ray
    Data. autocast: a type to compute in, as `torch.bfloat16`. Raises `StoreError` for a store of another model,
    preprocessing, data set or question, naming what differs, for one that another process writes into, and where
    nothing can be written; what was stored before stays.
    """
    require_installed()
    handle = opened(model, device=device, dtype=dtype)
    begun, forwards = time.perf_counter(), handle.forwards
    data = open_data(dataset, handle.spec)
    names = _names(handle, data, layers)
    targets = [as_target(target) for target in scores]
    several: dict[str, list[Statistic]] = {
        name: [Features(), Top(k), Top(k, largest=False), Moments()] for name in names
    }
    with progress_bar("scan", " images", progress) as report:
        passes.scan(
            handle,
            data,
            several,
            joint=passes.Joint(targets, [Features(), Top(k), Top(k, largest=False)]) if targets else None,
            store=store,
            engine=engine,
            resume=resume,
            batch_size=batch_size,
            workers=workers,
            autocast=autocast,
            skip_failures=skip_failures,
            progress=report,
        )
    for name in names:
        stored_features(store, name)  # in a table, for queries
    return Scan.open(store, seconds=time.perf_counter() - begun, forwards=handle.forwards - forwards)


def _names(handle: Handle, data: DataSet, layers: Sequence[object] | str | None) -> list[str]:
    if isinstance(layers, str):
        return [layers]
    if layers is not None:
        return list(dict.fromkeys(map(str, layers)))
    shape = first_shape(handle, data)
    last = default_layer(handle, data)
    try:
        return list(dict.fromkeys([handle.features_at(shape), last]))
    except NotApplicable:  # a model without a spatial layer
        return [last]
