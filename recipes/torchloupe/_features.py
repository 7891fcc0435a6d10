"""The features of a data set, to be laid out and searched as often as one likes."""

from __future__ import annotations

import os
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe_adapters.lancedb import require_installed
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.errors import BadInput
from torchloupe_core.features import FeatureSet, collect
from torchloupe_core.handle import Handle
from torchloupe_core.store import is_store
from torchloupe_core.stored import stored_features

__all__ = ["features", "gathered", "handle_of"]


def features(
    model: ModelLike,
    dataset: Any,
    layer: object = None,
    *,
    store: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    resume: bool = True,
    batch_size: int | None = None,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: bool | None = None,
) -> FeatureSet:
    """One vector for each image of a data set: what a layer gives, averaged over positions.

    `embed` and `neighbors` take the answer in place of the data set, and then need no forward pass. layer: what goes
    into the classifier unless given; `fc.in` is what goes into `fc`. store, engine, resume: as in `scan`. A store
    in place of the data set needs no forward pass either. autocast: a type to compute in, as
    `torch.bfloat16`. skip_failures: images that cannot be read are noted in `.skipped`; otherwise the first one raises.
    """
    facts: dict[str, Any] = {"store": store, "engine": engine, "resume": resume, "skip_failures": skip_failures}
    facts |= {"batch_size": batch_size, "workers": workers, "autocast": autocast}
    return gathered(opened(model, device=device, dtype=dtype), dataset, layer, progress=progress, **facts)


def gathered(
    handle: Handle | None, dataset: Any, layer: object, *, progress: bool | None, **options: Any
) -> FeatureSet:
    """The features of whatever a verb was given as its data set. Options are those of `collect`."""
    if isinstance(dataset, FeatureSet):
        if layer is not None and str(layer) != dataset.layer:
            raise BadInput(f"these are features of layer {dataset.layer!r}; got layer={str(layer)!r}")
        return dataset
    if options.get("store") is None and is_store(dataset):
        require_installed()
        return stored_features(dataset, layer, handle)
    if handle is None:
        raise BadInput("without a model the data set is its features, as tl.features gives them, or a store of them")
    if options.get("store") is not None:
        require_installed()
    with progress_bar("features", " images", progress) as report:
        return collect(handle, dataset, layer, progress=report, **options)


def handle_of(model: ModelLike | None, device: torch.device | str | None, dtype: torch.dtype | None) -> Handle | None:
    """The handle of a model, None for none: what is known already needs none."""
    return None if model is None else opened(model, device=device, dtype=dtype)
