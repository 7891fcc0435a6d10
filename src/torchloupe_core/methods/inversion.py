"""How far images are from others in what layers see of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchloupe_core.handle import Handle

__all__ = ["distances"]

TOGETHER = 8
TINY = 1e-12


def distances(handle: Handle, images: Tensor, given: Tensor, layers: Sequence[str]) -> Tensor:
    """`[n, layers]`: the relative squared distance of activations, `mean((a - a0)^2) / mean(a0^2)`, from those given.

    images, given: `[n, C, H, W]` in [0, 1]. Mahendran and Vedaldi 2015, Understanding Deep Image Representations by
    Inverting Them, eq. 2 and 4.
    """
    names, shape = list(dict.fromkeys(layers)), (given.shape[1], given.shape[2], given.shape[3])
    found = []
    with handle.watch(*names, shape=shape) as watch:
        for start in range(0, len(images), TOGETHER):
            part = slice(start, start + TOGETHER)
            watch(handle.spec.normalised(torch.cat([images[part], given[part]])).to(handle.dtype))
            pairs = [watch.map(name).flatten(1).double().chunk(2) for name in layers]
            found.append(
                torch.stack([(a - b).square().mean(1) / b.square().mean(1).clamp(min=TINY) for a, b in pairs], 1).cpu()
            )
    return torch.cat(found).float()
