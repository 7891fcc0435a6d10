"""Maps that know nothing of the model: what any method must beat."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FLOORS", "floors"]

FLOORS = ("random", "centre", "edges")


def floors(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Maps `[N, H, W]` of images `[N, 3, H, W]`: noise, a blob in the middle, and the strength of edges (Sobel)."""
    count, _, height, width = images.shape
    noise = torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed))
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    blob = torch.exp(-2 * (x**2 + y**2)).expand(count, -1, -1)
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    grey = F.pad(images.float().mean(1, keepdim=True), [1] * 4, mode="replicate")
    strength = F.conv2d(grey, torch.stack([slope, slope.T])[:, None]).norm(dim=1)
    return dict(zip(FLOORS, (noise, blob, strength), strict=True))
