"""Images that are their own numbers: pixels kept in range, and near to a given image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchloupe_core.canvas import Canvas, Draw
from torchloupe_core.errors import BadInput
from torchloupe_core.parametrizations import Parametrization, Shape

__all__ = ["Bounded", "Near", "nearest"]

TINY = 1e-30


class Bounded(Canvas):
    """Pixels in [0, 1] that no step leads out of; within eps of the image they were painted with, if there is one.

    norm: "linf", each number by itself, or "l2", all numbers of an image together. noise: `[n, C, H, W]`, by which they
    are moved from the image that they are painted with.
    """

    def __init__(self, start: Tensor, eps: float | None, norm: str, noise: Tensor | None = None) -> None:
        super().__init__([start], lambda: self.tensors[0])
        self.eps, self.norm, self.noise = eps, norm, noise
        self.centre = start.detach().clone()

    def images(self) -> Tensor:
        return self.tensors[0]

    def paint(self, images: Tensor) -> None:
        with torch.no_grad():
            self.centre = images.detach().to(self.tensors[0], copy=True)
            self.tensors[0].copy_(self.centre if self.noise is None else self.centre + self.noise)
        self.settle()

    def settle(self) -> None:
        with torch.no_grad():
            self.tensors[0].copy_(nearest(self.tensors[0], self.centre, self.eps, self.norm).clamp(0, 1))


def nearest(images: Tensor, centre: Tensor, eps: float | None, norm: str) -> Tensor:
    """The images `[n, C, H, W]`, moved into the ball of radius eps around the centre; as they are if eps is None."""
    if eps is None:
        return images
    moved = images - centre
    if norm == "linf":
        return centre + moved.clamp(-eps, eps)
    length = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    inside: Tensor = centre + moved * (eps / length.clamp(min=TINY)).clamp(max=1.0)
    return inside


@dataclass(frozen=True)
class Near(Parametrization):
    """Pixels themselves, in [0, 1] and within eps of the image that is begun with.

    random: the start is a random place in the ball, with "linf" of a uniform distribution, with "l2" in a uniform
    direction at a uniform distance.
    """

    lr: ClassVar[float] = 0.01

    eps: float | None = None
    norm: str = "linf"
    random: bool = False

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        start = torch.full((len(draw), *shape), 0.5, device=device, dtype=dtype)
        noise = self._noise(draw, shape).to(device, dtype) if self.random and self.eps is not None else None
        return Bounded(start, self.eps, self.norm, noise)

    def _noise(self, draw: Draw, shape: Sequence[int]) -> Tensor:
        eps = self.eps or 0.0
        if self.norm == "linf":
            return (2 * draw.uniform(*shape) - 1) * eps
        direction = draw(*shape)
        direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        noise: Tensor = direction * eps * draw.uniform(1, 1, 1)
        return noise

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise BadInput(f'norm is "linf" or "l2"; got {self.norm!r}')
        if self.eps is not None and not 0 < self.eps < float("inf"):
            raise BadInput(f"eps is above 0; got {self.eps}")
