"""What in a given image moves a target, and what a layer makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe._visualize import rendered
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.making import asked
from torchloupe_core.targets import Target, TargetLike
from torchloupe_core.targets import layer as of_layer
from torchloupe_core.terms import Caricature, Nearness
from torchloupe_core.visualization import Visualization

__all__ = ["accentuate", "caricature"]


def accentuate(
    model: ModelLike,
    image: Any,
    target: TargetLike | Sequence[TargetLike],
    *,
    weight: float = 1.0,
    layer: object = None,
    steps: int = 128,
    device: torch.device | str | None = None,
    **options: Any,
) -> Visualization:
    """The image with more of what moves the target in it, near to itself in what an earlier layer sees.

    Feature accentuation (Hamblin et al. 2024, Feature Accentuation: Revealing 'What' Features Respond to in Natural
    Images): the optimisation begins from the image, and `weight` times the relative squared distance of the activations
    of `layer` from the image's own, under the same transforms, is subtracted. layer: half-way to what the target reads
    unless given. options: of `visualize`. `given` in the result is the image itself.
    """
    handle = opened(model, device=device)
    wanted = asked(target, 1)
    inputs = handle.inputs(image)
    shape = (inputs.shape[1], inputs.shape[2], inputs.shape[3])
    if len(wanted) == 1:
        wanted = wanted * len(inputs)
    near = _half_way(handle, wanted, shape) if layer is None else str(layer)
    term = Nearness((near,), weight)
    return rendered(handle, wanted, init=inputs, compare=inputs, terms=(term,), steps=steps, **options)


def caricature(
    model: ModelLike,
    image: Any,
    layer: object,
    *,
    power: float = 1.0,
    steps: int = 256,
    device: torch.device | str | None = None,
    **options: Any,
) -> Visualization:
    """An image, made from noise, that excites a layer as the given one does, position by position, and more so.

    The mean over positions of the dot product of the two activations, times max(0.1, cosine) ** power, under the same
    transforms (Olah et al. 2018, The Building Blocks of Interpretability; OpenAI Microscope). options: of `visualize`.
    The target in the result is the layer; `scores` are its mean square.
    """
    handle = opened(model, device=device)
    inputs = handle.inputs(image)
    found = handle.layer(layer, (inputs.shape[1], inputs.shape[2], inputs.shape[3]))
    if found.layout is None:
        raise NotApplicable(f"layer {str(layer)!r} ({found.kind}) gives no map of channels, so it has no caricature")
    term = Caricature((str(layer),), power=power)
    wanted = [of_layer(layer)] * len(inputs)
    return rendered(handle, wanted, compare=inputs, terms=(term,), aim=0.0, steps=steps, **options)


def _half_way(handle: Handle, wanted: Sequence[Target], shape: Shape) -> str:
    """Of the spatial layers before what the targets read the one in the middle, or the outermost it is a part of."""
    layers = handle.trace(shape).layers
    begins = [handle.layer(name, shape).begins for one in wanted for name in one.layers]
    before = [
        one
        for one in layers.values()
        if one.spatial and not one.in_attention and one.ends < min(begins, default=math.inf)
    ]
    if not before:
        raise BadInput("no spatial layer comes before what the target reads; name layer=, where the image stays itself")
    middle = before[len(before) // 2].name
    names = {one.name for one in before}
    parts = middle.split(".")
    return next(name for depth in range(1, len(parts) + 1) if (name := ".".join(parts[:depth])) in names)
