"""How much memory a step takes at a size, told from a small one, so that what would not fit is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchloupe_core.handle import Handle, Shape
from torchloupe_core.memory import available, require

__all__ = ["kept_bytes", "probe", "require_room"]

SMALL, LEAST = 192, 64  # pixels of the longer side on which memory is measured, and of the shorter
LARGE = 512 * 512  # pixels from which on it is worth asking
MORE = 2.0  # gradients on their way, and what a layer needs besides what it keeps
COPIES = 40  # of the image's numbers: pairs of L-BFGS, copies to go back to, gradients


def require_room(handle: Handle, shape: Shape, layers: Sequence[str], count: int) -> None:
    """Raises `BadInput` where a forward and backward pass of `count` images would not fit, with the size that does.

    shape: (C, H, W) of an image. layers: the last of them is where the pass ends.
    """
    pixels = shape[1] * shape[2] * count
    free = available(handle.device)
    if pixels <= LARGE or free is None:
        return
    small = probe(handle, shape)
    each = kept_bytes(handle, small, layers) * MORE / (small[1] * small[2]) + 4 * COPIES * shape[0]
    longest = int(max(shape[1:]) * math.sqrt(0.9 * free / (each * pixels)))
    what = f"a step on {count} image{'s' * (count > 1)} of {shape[1]}x{shape[2]}"
    require(each * pixels, what, handle.device, f"a longer side of size={longest} fits")


def kept_bytes(handle: Handle, shape: Shape, layers: Sequence[str]) -> int:
    """Bytes that a forward pass of one image up to the last of the layers keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # or another tensor would come to lie in its place
        return tensor

    held: list[Tensor] = []
    parameters = {one.untyped_storage().data_ptr() for one in handle.module.parameters()}
    with handle.watch(*layers, shape=shape) as watch, torch.enable_grad():
        inputs = torch.zeros(1, *shape, device=handle.device, dtype=handle.dtype).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            watch(inputs)
    return sum(size for place, size in kept.items() if place not in parameters)


def probe(handle: Handle, shape: Shape) -> Shape:
    """A small shape to look at layers with in place of a large one, whose pass might not fit."""
    if handle.spec.fixed_size or shape[1] * shape[2] <= LARGE:
        return shape
    factor = SMALL / max(shape[1:])
    return shape[0], max(LEAST, round(shape[1] * factor)), max(LEAST, round(shape[2] * factor))
