"""Colours without their correlation: what natural images vary along, one number after the other.

In natural images red, green and blue rise and fall together. A matrix `[3, 3]` takes three independent numbers to the
red, green and blue that vary as pictures do, before a sigmoid makes them pixels in [0, 1] (Olah 2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput

__all__ = ["IMAGENET", "Colours", "as_colours", "matched", "measured", "mixed", "separated"]

Colours = str | Sequence[Sequence[float]] | Tensor | None

# Root of the covariance of ImageNet's pixels, as published with Olah 2017.
IMAGENET = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])


def as_colours(colours: Colours, channels: int) -> Tensor | None:
    """The matrix meant, its longest column of length 1; None where each channel is a number of its own.

    "imagenet", "none" or None, or a matrix as `measured` gives it. Images that have not three channels are left alone.
    """
    if colours is None or channels != 3 or (isinstance(colours, str) and colours == "none"):
        return None
    if isinstance(colours, str) and colours != "imagenet":
        raise BadInput(f'colours is "imagenet", "none" or a matrix [3, 3]; got {colours!r}')
    matrix = IMAGENET if isinstance(colours, str) else torch.as_tensor(colours, dtype=torch.float32)
    if matrix.shape != (3, 3) or not matrix.isfinite().all() or torch.linalg.matrix_rank(matrix) < 3:
        raise BadInput(f"colours as a matrix are [3, 3] and can be undone; got {matrix.tolist()}")
    longest: Tensor = matrix.norm(dim=0).max()
    return matrix / longest


def measured(images: Tensor) -> Tensor:
    """`[3, 3]`: the root of the covariance of the pixels of images `[N, 3, H, W]`, for use as `colours`."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise BadInput(f"colours are measured on images [N, 3, H, W]; got {list(images.shape)}")
    values = images.detach().double() / (255.0 if images.dtype == torch.uint8 else 1.0)
    pixels = values.movedim(1, 0).flatten(1)  # [3, pixels]
    spread, vectors = torch.linalg.eigh(torch.cov(pixels))
    if spread[0] <= 1e-12 * spread[2]:
        raise BadInput("these images have no three independent colours, as grey ones; use colours='imagenet'")
    root: Tensor = vectors * spread.sqrt()
    root = root * root.sum(0).sign()  # an eigenvector's sign is arbitrary; brighter is more
    return root.flip(1).float()


def matched(images: Tensor, like: Tensor) -> Tensor:
    """Images `[n, 3, H, W]` with the mean colour and the covariance of colours of others, `[n, 3, h, w]`; in [0, 1].

    By the one linear map that is symmetric for equal covariances (Gatys et al. 2016, Preserving Color in Neural
    Artistic Style Transfer, eq. 3). Images that have not three channels get mean and spread channel by channel.
    """
    found = []
    for image, other in zip(images.double(), like.double(), strict=True):
        pixels, goal = image.flatten(1), other.flatten(1)  # [C, pixels]
        root, back = _root(torch.cov(goal).view(len(goal), -1)), _root(torch.cov(pixels).view(len(goal), -1), -0.5)
        moved = root @ back @ (pixels - pixels.mean(1, keepdim=True)) + goal.mean(1, keepdim=True)
        found.append(moved.view_as(image))
    return torch.stack(found).clamp(0, 1).to(images)


def _root(covariance: Tensor, power: float = 0.5) -> Tensor:
    """The symmetric power of a covariance; colours that do not vary at all are left as they are."""
    spread, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * spread.clamp(min=1e-8) ** power @ vectors.T
    return root


def mixed(values: Tensor, colours: Tensor | None) -> Tensor:
    """Independent numbers `[n, 3, H, W]` as red, green and blue."""
    if colours is None:
        return values
    return torch.einsum("rc,nchw->nrhw", colours.to(values), values)


def separated(values: Tensor, colours: Tensor | None) -> Tensor:
    """Red, green and blue `[n, 3, H, W]` as independent numbers: `mixed` undone."""
    if colours is None:
        return values
    return torch.einsum("cr,nrhw->nchw", torch.linalg.inv(colours.double()).to(values), values)
