"""Pixels filled in from their neighbours (Rong et al. 2022, ROAD: noisy linear imputation)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["imputed"]

DIAGONAL, STRAIGHT = 1 / 12, 1 / 6  # weights of the eight neighbours
TOLERANCE, MOST = 1e-5, 1000  # of the residual; iterations


def imputed(images: Tensor, removed: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Images `[N, C, H, W]` whose removed pixels, `[N, H, W]` bool, are weighted means of their eight neighbours.

    All removed pixels are solved for at once, by conjugate gradients; at the border there are fewer neighbours.
    Gaussian noise of that standard deviation is added to them.
    """
    exact = images.double()
    hole = removed[:, None].expand_as(exact)
    kernel = torch.tensor([[DIAGONAL, STRAIGHT, DIAGONAL], [STRAIGHT, 0.0, STRAIGHT], [DIAGONAL, STRAIGHT, DIAGONAL]])
    kernel = kernel.to(exact)[None, None]
    there = _around(torch.ones_like(exact[:1, :1]), kernel)  # the sum of the weights of a pixel's neighbours
    known = exact.where(~hole, 0.0)
    wanted = _around(known, kernel).where(hole, 0.0)
    found = _solved(lambda x: (there * x - _around(x, kernel)).where(hole, 0.0), wanted, there)
    drawn = torch.randn(images.shape, generator=generator, dtype=torch.float64).to(exact.device)
    return torch.where(hole, found + noise * drawn, exact).to(images.dtype)


def _around(x: Tensor, kernel: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    return F.conv2d(x.reshape(-1, 1, height, width), kernel, padding=1).view(count, channels, height, width)


def _solved(apply: object, wanted: Tensor, diagonal: Tensor) -> Tensor:
    """The solution of a symmetric positive definite system for each image and channel."""
    assert callable(apply)
    x, residual = torch.zeros_like(wanted), wanted
    z = residual / diagonal
    direction, size = z, _dot(residual, z)
    limit = TOLERANCE**2 * _dot(wanted, wanted).clamp(min=1e-30)
    for _ in range(MOST):
        image = apply(direction)
        step = size / _dot(direction, image).clamp(min=1e-300)
        x, residual = x + step * direction, residual - step * image
        if bool((_dot(residual, residual) <= limit).all()):
            break
        z = residual / diagonal
        before, size = size, _dot(residual, z)
        direction = z + size / before.clamp(min=1e-300) * direction
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)
