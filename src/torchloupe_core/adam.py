"""Adam, step by step as torch's own, which takes seconds to import what compiles it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchloupe_core.descent import Descent

__all__ = ["Adam"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Adam(Descent):
    """Moves leaf tensors against their gradients (Kingma and Ba 2015, algorithm 1, with its default constants)."""

    def __init__(self, tensors: Sequence[Tensor], lr: float) -> None:
        super().__init__(tensors, lr)
        self.steps = 0
        self._means = [torch.zeros_like(tensor) for tensor in tensors]
        self._squares = [torch.zeros_like(tensor) for tensor in tensors]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], losses: Tensor | None = None) -> None:
        self.steps += 1
        size = self.lr / (1 - BETA1**self.steps)
        scale = math.sqrt(1 - BETA2**self.steps)
        for tensor, gradient, mean, square in zip(self.tensors, gradients, self._means, self._squares, strict=True):
            mean.lerp_(gradient, 1 - BETA1)
            square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            tensor.addcdiv_(mean, (square.sqrt() / scale).add_(EPSILON), value=-size)

    def kept(self) -> list[Tensor]:
        """Copies of what it remembers of the gradients, to go on from later: means, then squares."""
        return [one.clone() for one in (*self._means, *self._squares)]

    def go_on(self, steps: int, kept: Sequence[Tensor]) -> None:
        """Goes on from where another had come."""
        self.steps, count = steps, len(self._means)
        self._means, self._squares = list(kept[:count]), list(kept[count:])
