"""The learned filters of a layer as pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.errors import BadInput
from torchloupe_core.filters import Filters, Scale
from torchloupe_core.methods.expanded import expanded_kernels
from torchloupe_core.methods.filters import class_names, own_kernels

__all__ = ["weights"]


def weights(
    model: ModelLike,
    layer: object,
    *,
    to: object = None,
    channels: Sequence[int] | int | None = None,
    scale: Scale = "shared",
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Filters:
    """The learned filters of a layer as pictures: colours where it reads the image, else a map for each input channel.

    layer: a convolution or linear layer, or a module that holds exactly one, as a patch embedding. to: an earlier layer
    or "input"; the weights are then those of the centre unit over that layer's map, through everything between, without
    the nonlinearities (Voss et al. 2021, Visualizing Weights). channels: the output channels wanted, all unless given.
    scale: "shared" draws all filters on one scale, "each" every filter on its own. Raises `NotApplicable` where a layer
    holds no filters, or where no fixed weights join the two layers, as across attention.
    """
    if scale not in ("shared", "each"):
        raise BadInput(f'scale is "shared" or "each"; got {scale!r}')
    handle = opened(model, device=device, dtype=None if to is None else torch.float64)
    begun, forwards = time.perf_counter(), handle.forwards
    with progress_bar("weights", "channels", progress) as report:
        if to is None:
            found = own_kernels(handle, str(layer), channels)
        else:
            found = expanded_kernels(handle, str(layer), str(to), channels, report)
    return Filters(
        method="weights" if to is None else "expanded_weights",
        backend="native",
        seed=0,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(),
        options={},
        images=found.images,
        inputs=found.inputs,
        layer=found.layer,
        channels=tuple(found.channels),
        colour=found.colour,
        scale=scale,
        to=None if to is None else str(to),
        names=class_names(handle, found.layer, found.channels),
        diagnostics=found.facts,
    )
