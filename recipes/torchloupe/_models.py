"""Opening a model: by name, or any module of yours."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import torchloupe_adapters  # noqa: F401  (says where methods and sources live)
from torchloupe_adapters import checkpoint as checkpoints
from torchloupe_core import registry
from torchloupe_core.borrow import kept_randomness
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.handle import Handle, unwrapped
from torchloupe_core.layout import Layout
from torchloupe_core.spec import OutputSelector, Preprocess, Spec, resize_and_normalise

__all__ = ["ModelLike", "at_checkpoint", "load", "opened", "wrap"]

ModelLike = Handle | nn.Module | str


def load(
    name: str,
    *,
    pretrained: bool | None = None,
    checkpoint: str | Path | None = None,
    classes: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    input_size: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
    output: OutputSelector | None = None,
    **options: Any,
) -> Handle:
    """A model by name: `timm/resnet50.a1_in1k`, `torchvision/resnet50`, `demo`, `demo/backdoored`.

    Weights, preprocessing, class names and input size come as the ecosystem has them; what is given here wins.
    checkpoint: a file of weights, safetensors or a plain state dict, instead of pretrained ones. pretrained=False
    without a checkpoint: random weights. Options go to the ecosystem's own constructor; torchvision's `weights=` among
    them. Raises `UnknownName` for a name that is not there, `BadInput` where weights cannot be had or do not fit.
    """
    source, _, rest = name.partition("/")
    try:
        entry = registry.find("load", source)
    except UnknownName:
        raise UnknownName(
            f"no model {name!r}; a name begins with its source, as in 'timm/resnet18', 'torchvision/resnet18' or 'demo'"
        ) from None
    if classes is not None and source != "demo":
        options.setdefault("num_classes", len(classes))
    entry.check_options(options)
    handle: Handle = entry.run(rest, pretrained=pretrained, checkpoint=checkpoint, **options)
    facts = _stated(handle.spec, classes, preprocess, input_size, output=output)
    return Handle(handle.module if device is None else handle.module.to(device), facts)


def wrap(
    module: nn.Module,
    *,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] | None = None,
    input_size: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    output: OutputSelector | None = None,
    layouts: Mapping[str, Layout | None] | None = None,
    prefix: int | None = None,
    name: str | None = None,
) -> Handle:
    """Any module, ready to be asked; timm's and torchvision's are recognised. The module itself is not changed.

    preprocess: a picture to one model input `[C, H, W]`; without it pictures are resized to `input_size` (C, H, W) and
    scaled to [0, 1], and normalised with `mean` and `std` if given. output: which tensor of a tuple or dict output
    holds the logits, an index, a key or a function; of a detector, a function that gives for each image a dict of
    `boxes [D, 4]` (left, top, right, bottom), `labels [D]` and `scores [D]`. layouts: the `Layout` of layers that are
    inferred wrongly, None for modules that give no map of the image. prefix: class and register tokens before the grid.
    """
    if not isinstance(module, nn.Module):
        raise BadInput(f"wrap takes a torch.nn.Module; got {type(module).__name__}")
    module = unwrapped(module)
    spec = _recognised(module) or Spec(name=type(module).__name__)
    changes = {
        "mean": mean and tuple(mean),
        "std": std and tuple(std),
        "layouts": layouts,
        "prefix": prefix,
        "name": name,
    }
    return Handle(module, _stated(spec, classes, preprocess, input_size, output=output, **changes))


def opened(
    model: ModelLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    output: OutputSelector | None = None,
) -> Handle:
    """The handle of whatever a verb was given. Where device, dtype or memory format differ a copy is asked instead."""
    if isinstance(model, str):
        handle = load(model)
    elif isinstance(model, Handle):
        handle = model
    elif isinstance(model, nn.Module):
        handle = wrap(model)
    else:
        raise BadInput(f"a model is a name, a torch.nn.Module or a Handle; got {type(model).__name__}")
    if output is not None:
        handle = handle.with_spec(output=output)
    return handle.to(device, dtype, memory_format=memory_format)


def at_checkpoint(handle: Handle, checkpoint: Any) -> Handle:
    """The model of a handle as another checkpoint has it, a copy: a file, a state dict, a module or a handle."""
    if isinstance(checkpoint, Handle):
        return checkpoint
    if isinstance(checkpoint, nn.Module):
        return Handle(checkpoint, handle.spec)
    if not isinstance(checkpoint, (str, os.PathLike, Mapping)):
        raise BadInput(f"a checkpoint is a file, a state dict, a module or a Handle; got {type(checkpoint).__name__}")
    module = copy.deepcopy(handle.module)
    if isinstance(checkpoint, Mapping):
        checkpoints.load_state(module, checkpoint, "the state dict")
    else:
        checkpoints.load_into(module, Path(checkpoint))
    return Handle(module, handle.spec)


def _recognised(module: nn.Module) -> Spec | None:
    found = (entry.run(module) for entry in registry.methods("recognise"))
    return next((spec for spec in found if spec is not None), None)


def _stated(
    spec: Spec,
    classes: Sequence[str] | None,
    preprocess: Preprocess | None,
    input_size: tuple[int, int, int] | None,
    **others: Any,
) -> Spec:
    """The facts of a source, overridden by what the user states."""
    changes = {key: value for key, value in others.items() if value is not None}
    if classes is not None:
        changes["classes"] = tuple(classes)
    if input_size is not None:
        if len(input_size) != 3 or min(input_size) < 1:
            raise BadInput(f"input_size is (C, H, W); got {tuple(input_size)}")
        changes["input_size"] = tuple(input_size)
        for key in ("mean", "std"):  # a source's, for another number of channels
            known: tuple[float, ...] | None = getattr(spec, key)
            if known and key not in changes and len(known) != input_size[0]:
                changes[key] = (sum(known) / len(known),) * input_size[0]
    if preprocess is not None:
        changes |= {"preprocess": preprocess, "preprocess_text": "preprocess given", **_read_off(preprocess)}
        if input_size is not None:
            changes["input_size"] = tuple(input_size)
    elif (input_size or "mean" in changes or "std" in changes) and (size := changes.get("input_size", spec.input_size)):
        mean, std = changes.get("mean", spec.mean), changes.get("std", spec.std)
        changes["preprocess"] = resize_and_normalise(size, mean, std)
        changes["preprocess_text"] = f"resized to {size[1]}x{size[2]}" + (
            ", normalised" if mean else ", not normalised"
        )
    return replace(spec, **changes)


def _read_off(preprocess: Preprocess) -> dict[str, Any]:
    """What a transform shows of itself: its normalisation, and its output size if that is always the same."""
    facts: dict[str, Any] = {}
    for step in (*getattr(preprocess, "transforms", ()), preprocess):
        mean, std = getattr(step, "mean", None), getattr(step, "std", None)
        if mean is not None and std is not None:
            facts |= {"mean": _floats(mean), "std": _floats(std)}
    sizes = set()
    with kept_randomness():
        for width, height in ((320, 240), (200, 300)):
            try:
                sizes.add(tuple(preprocess(Image.new("RGB", (width, height))).shape))
            except Exception as error:
                raise BadInput(f"preprocess fails on a plain RGB picture: {error}") from error
    if len(sizes) == 1 and len(only := sizes.pop()) == 3:
        facts["input_size"] = only
    return facts


def _floats(values: Sequence[float] | Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
