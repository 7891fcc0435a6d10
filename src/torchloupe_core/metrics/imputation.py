"""Pixels filled in from their neighbours (Rong et al. 2022, ROAD: noisy linear imputation)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["imputed"]

TOLERANCE, MOST = 1e-4, 500  # of the residual, far below the noise; iterations


def imputed(images: Tensor, removed: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Images `[N, C, H, W]` whose removed pixels, `[N, H, W]` bool, are weighted means of their eight neighbours.

    All removed pixels are solved for at once, by conjugate gradients; at the border there are fewer neighbours.
    Gaussian noise of that standard deviation is added to them.
    """
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    hole = removed[:, None].expand_as(exact)
    there = _around(torch.ones_like(exact[:1, :1]))  # the sum of the weights of a pixel's neighbours
    wanted = _around(exact.where(~hole, 0.0)).where(hole, 0.0)
    found = _solved(lambda x: (there * x - _around(x)).where(hole, 0.0), wanted, there)
    drawn = torch.randn(images.shape, generator=generator).to(exact)
    return torch.where(hole, found + noise * drawn, exact).to(images.dtype)


def _around(x: Tensor) -> Tensor:
    """The weighted sum of the eight neighbours: 1/6 of those beside and above, 1/12 of those across a corner."""
    rows = 2 * x
    rows[..., 1:, :] += x[..., :-1, :]
    rows[..., :-1, :] += x[..., 1:, :]
    both = 2 * rows
    both[..., 1:] += rows[..., :-1]
    both[..., :-1] += rows[..., 1:]
    return (both - 4 * x) / 12


def _solved(apply: Callable[[Tensor], Tensor], wanted: Tensor, diagonal: Tensor) -> Tensor:
    """The solution of a symmetric positive definite system for each image and channel."""
    x, residual = torch.zeros_like(wanted), wanted
    z = residual / diagonal
    direction, size = z, _dot(residual, z)
    limit = TOLERANCE**2 * _dot(wanted, wanted).clamp(min=1e-20)
    for _ in range(MOST):
        image = apply(direction)
        step = size / _dot(direction, image).clamp(min=1e-200)
        x, residual = x + step * direction, residual - step * image
        if bool((_dot(residual, residual) <= limit).all()):
            break
        z = residual / diagonal
        before, size = size, _dot(residual, z)
        direction = z + size / before.clamp(min=1e-200) * direction
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)
