"""The images and patches of a data set that move a unit most."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.dataset import class_names, open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.examples import Examples
from torchloupe_core.methods.patches import Band, Crop, placed, search
from torchloupe_core.store import is_store
from torchloupe_core.targets import TargetLike

__all__ = ["examples"]


def examples(
    model: ModelLike,
    dataset: Any,
    target: TargetLike | Sequence[TargetLike],
    *,
    k: int = 9,
    crop: Crop = "patch",
    band: Band = "max",
    per_image: int = 1,
    without_gates: bool = False,
    seed: int = 0,
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
) -> Examples:
    """The k images of a data set, or patches of images, where a unit is largest, for any number of units in one pass.

    target: a unit, an output, a sum of them, or a list; a layer stands for all its channels. Within a layer sums are
    taken position by position. crop: "patch" ranks positions, at most `per_image` of one image, and cuts the exact
    receptive field of each, the whole image for outputs and sums over layers; "image" ranks images by their largest
    value and marks where it is. band: "max"; "min", where the unit is smallest; "middle", around the median;
    "spectrum", a fifth each of minimum, slightly negative, median, slightly positive and maximum (Olah et al. 2017,
    Feature Visualization): "slightly" is a quarter of the way out among the values beyond zero and the median, or
    beyond the median if there are none. Middle and spectrum rank the values at one random position (with "image" the
    largest values) of up to 2,048 images, drawn with `seed`.

    without_gates: cut what is read beside gates that see the whole map, as attention and squeeze-excite. workers,
    autocast, skip_failures, store, engine, resume: as in `scan`. A store in place of the data set needs no forward pass
    where it holds what is asked: bands "max" and "min" of its layers, up to its k. Where the data set has fewer images
    than k there are fewer columns. Raises `NotApplicable` for a layer of one position with crop="patch", `BadInput` if
    no image can be read.
    """
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"batch_size is at least 1; got {batch_size}")
    handle = opened(model, device=device, dtype=dtype)
    targets = [target] if isinstance(target, str) or not isinstance(target, Sequence) else list(target)
    if not targets:
        raise BadInput("no target was given")
    begun, forwards = time.perf_counter(), handle.forwards
    data = open_data(dataset, handle.spec)
    store = dataset if store is None and is_store(dataset) else store
    with progress_bar("examples", "images", progress) as report:
        found = search(
            handle,
            data,
            targets,
            k=k,
            crop=crop,
            band=band,
            per_image=per_image,
            seed=seed,
            store=store,
            engine=engine,
            resume=resume,
            batch_size=batch_size,
            workers=workers,
            autocast=autocast,
            skip_failures=skip_failures,
            progress=report,
        )
    places, scanned = placed(handle, found, without_gates=without_gates), found.scanned
    winners = sorted(set(found.indices[found.indices >= 0].tolist()))
    labels = torch.tensor([scanned.labels.get(index, -1) for index in found.indices.flatten().tolist()])
    return Examples(
        method="examples",
        backend="native",
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(),
        options={"per_image": per_image, "without_gates": without_gates},
        units=tuple(map(str, found.units)),
        asked=tuple(map(str, found.asked)),
        scores=found.scores.float(),
        indices=found.indices,
        **places._asdict(),
        labels=labels.view(found.indices.shape),
        crop=crop,
        band=band,
        bands=found.bands,
        images=scanned.images,
        skipped={data.name(index): why for index, why in scanned.skipped.items()},
        names={} if data.names is None else {str(index): data.names[index] for index in winners},
        classes=class_names(data),
        data=data,
    )
