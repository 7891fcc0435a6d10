"""Where a unit is read before its ReLU."""

from __future__ import annotations

from dataclasses import replace

import torch

from torchloupe_core.atoms import Unit
from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.targets import Target
from torchloupe_core.watch import Place

__all__ = ["before_rectifier", "read_before_rectifier"]

RECTIFIERS = ("ReLU", "ReLU6")


def read_before_rectifier(handle: Handle, target: Target, shape: Shape) -> Target:
    """The target with every unit behind a ReLU read from what goes into that ReLU. Raises `NotApplicable`."""
    terms = []
    for weight, atom in target.terms:
        if isinstance(atom, Unit):
            atom = replace(atom, layer=before_rectifier(handle, atom.layer, shape))
        terms.append((weight, atom))
    return Target(tuple(terms))


def before_rectifier(handle: Handle, name: str, shape: Shape) -> str:
    """The place whose ReLU gives what the layer gives; the layer itself where it holds negative values.

    Found by the order in which modules end, and verified on a pass of noise. Raises `NotApplicable` where the layer is
    rectified by a function, which cannot be watched.
    """
    found: str = handle.kept(("before rectifier", name), shape, lambda: _verified(handle, name, shape))
    return found


def _verified(handle: Handle, name: str, shape: Shape) -> str:
    noise = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    last = _last_rectifier(handle, name, shape)
    with handle.watch(name, *([] if last is None else [last]), shape=shape) as watch:
        watch(noise.to(handle.device, handle.dtype))
        values = watch[name]
        if bool((values < 0).any()):
            return name
        if last is not None and watch[last].shape == values.shape and torch.equal(watch[last], values):
            return f"{last}.in"
    raise NotApplicable(
        f"layer {name!r} ({handle.layer(name, shape).kind}) is nowhere below zero and does not end in a ReLU module, "
        "so there is no place before its ReLU to read; leave read= out: where a unit is off, its gradient is redirected"
    )


def _last_rectifier(handle: Handle, name: str, shape: Shape) -> str | None:
    """The call of a ReLU module that ends last in a layer, or the layer itself."""
    if Place.parse(name).entering:
        return None
    layer = handle.layer(name, shape)
    if layer.kind in RECTIFIERS:
        return name
    inside = {
        text: call.ends
        for text, call in handle.trace(shape).calls.items()
        if call.kind in RECTIFIERS and text.startswith(f"{layer.name}.") and layer.begins < call.begins < layer.ends
    }
    return max(inside, key=inside.__getitem__, default=None)
