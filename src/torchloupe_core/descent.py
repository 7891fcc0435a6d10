"""How numbers are moved downhill: what every optimiser does, and steps along the steepest direction of a norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Descent", "Norm", "Steepest", "steepest"]

Norm = Literal["linf", "l2", "mean"]

TINY = 1e-30


class Descent:
    """Moves leaf tensors, the first dimension of each of them the images', against the gradients it is told.

    A step is: `begin`, then the losses and gradients where the tensors are now, then `step` with them.
    """

    def __init__(self, tensors: Sequence[Tensor], lr: float) -> None:
        self.tensors, self.lr = tensors, lr

    def begin(self) -> None:
        """Moves the tensors to where losses and gradients are wanted; mostly they are there already."""

    def step(self, gradients: Sequence[Tensor], losses: Tensor | None = None) -> Tensor | None:
        """One step, each tensor by its gradient; losses: `[n]`.

        Returns the losses where the tensors are now, if the optimiser has seen that place, as one with a line search.
        """
        raise NotImplementedError


class Steepest(Descent):
    """Steps of length `lr` in the direction that falls most steeply, measured by a norm, image by image.

    "linf": every number by lr, along the sign. "l2": lr in all, along the gradient. "mean": lr a number on average,
    along the gradient, as in the DeepDream notebook (Mordvintsev 2015). An image without a gradient stays.
    """

    def __init__(self, tensors: Sequence[Tensor], lr: float, norm: Norm) -> None:
        super().__init__(tensors, lr)
        self.norm = norm

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], losses: Tensor | None = None) -> None:
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            tensor.sub_(self._direction(gradient), alpha=self.lr)

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.norm == "linf":
            return gradient.sign()
        largest = gradient.flatten(1).abs().amax(1).clamp(min=TINY).view(-1, *(1,) * (gradient.ndim - 1))
        scaled = gradient / largest  # or squares of small gradients would vanish
        flat = scaled.flatten(1)
        length = flat.norm(dim=1) if self.norm == "l2" else flat.abs().mean(1)
        return scaled / length.clamp(min=TINY).view_as(largest)


def steepest(norm: Norm) -> Callable[[Sequence[Tensor], float], Steepest]:
    """What makes such an optimiser of tensors and a step size."""
    return lambda tensors, lr: Steepest(tensors, lr, norm)
