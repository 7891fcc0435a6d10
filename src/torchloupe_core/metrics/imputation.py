"""Pixels filled in from their neighbours (Rong et al. 2022, ROAD: noisy linear imputation)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["imputed"]

TOLERANCE, MOST = 1e-4, 500  # of the residual, far below the noise; iterations
WEIGHTS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))  # of a pixel's neighbours


def imputed(images: Tensor, removed: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Images `[N, C, H, W]` whose removed pixels, `[N, H, W]` bool, are weighted means of their eight neighbours.

    All removed pixels are solved for at once, by conjugate gradients; at the border there are fewer neighbours.
    Gaussian noise of that standard deviation is added to them.
    """
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    hole = removed[:, None].expand_as(exact)
    drawn = torch.randn(images.shape, generator=generator).to(exact)
    return torch.where(hole, _filled(exact, hole) + noise * drawn, exact).to(images.dtype)


def _filled(images: Tensor, hole: Tensor) -> Tensor:
    """The solution of a symmetric positive definite system for each image and channel; of use inside the hole alone."""
    known, inside = (one.reshape(1, -1, *one.shape[2:]) for one in (images.where(~hole, 0.0), hole.to(images)))
    kernel = images.new_tensor(WEIGHTS).expand(known.shape[1], 1, 3, 3)

    def around(x: Tensor) -> Tensor:
        """The weighted sum of the eight neighbours."""
        return F.conv2d(x, kernel, padding=1, groups=len(kernel))

    there = around(torch.ones_like(known))  # the sum of the weights of a pixel's neighbours
    residual = around(known) * inside
    x, limit = torch.zeros_like(residual), TOLERANCE**2 * _dot(residual, residual).clamp(min=1e-20)
    z = residual / there
    direction, size = z.clone(), _dot(residual, z)
    for _ in range(MOST):
        image = (there * direction).sub_(around(direction)).mul_(inside)
        step = size / _dot(direction, image).clamp(min=1e-200)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        if bool((_dot(residual, residual) <= limit).all()):
            break
        z = residual / there
        before, size = size, _dot(residual, z)
        direction.mul_(size / before.clamp(min=1e-200)).add_(z)
    return x.view_as(images)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)
