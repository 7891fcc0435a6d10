"""L-BFGS for many images at once, each with a line search of its own, one evaluation a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchloupe_core.descent import Descent

__all__ = ["LBFGS"]

MEMORY = 10  # pairs of steps and changes of the gradient
ENOUGH = 1e-4  # of what the slope promises (Armijo)
NEAREST, FURTHEST = 0.1, 0.5  # by how much a step that is too long is cut
FIRST, STRETCH = 0.1, 2.0  # by how much the first trial moves a number, at most; a step without curvature is stretched
TRIES = 12  # then the direction is given up for the gradient
TINY = 1e-20

Pair = tuple[Tensor, Tensor, Tensor]  # step [n, D], change of the gradient [n, D], 1 / their product [n], or 0


class LBFGS(Descent):
    """Nocedal 1980 with a backtracking line search (Nocedal and Wright, algorithms 3.1 and 7.4).

    Every step evaluates each image once, at a trial point. Where the loss falls enough the image moves there, else it
    stays and the next trial is nearer. So an image's loss never rises from step to step, and the tensors, between
    steps, are always at the best place seen. lr scales the first trial alone.
    """

    def __init__(self, tensors: Sequence[Tensor], lr: float = 1.0) -> None:
        super().__init__(tensors, lr)
        self._at, self._losses = self._flat(tensors), torch.empty(0)
        self._gradient = self._direction = torch.zeros_like(self._at)
        n = len(self._at)
        self._length = self._at.new_ones(n)
        self._tries = torch.zeros(n, dtype=torch.long, device=self._at.device)
        self._pairs: list[Pair] = []
        self._begun = False

    @torch.no_grad()
    def begin(self) -> None:
        if not self._begun:
            self._at = self._flat(self.tensors)
            return
        self._place(self._at + self._length[:, None] * self._direction)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], losses: Tensor | None = None) -> Tensor:
        if losses is None:
            raise ValueError("a line search compares losses")
        gradient, losses = self._flat(gradients), losses.to(self._at)
        if not self._begun:
            self._begun, self._losses, self._gradient = True, losses, gradient
            self._turn_downhill(torch.ones_like(losses, dtype=torch.bool))
            return losses
        slope = (self._gradient * self._direction).sum(1)
        taken = losses <= self._losses + ENOUGH * self._length * slope
        self._cut(~taken, losses, slope)
        self._move(taken, gradient, losses)
        self._place(self._at)
        return self._losses

    def _move(self, taken: Tensor, gradient: Tensor, losses: Tensor) -> None:
        """The images whose trial was good go there and get a new direction."""
        if not bool(taken.any()):
            return
        step = torch.where(taken, self._length, 0.0)[:, None] * self._direction
        change = torch.where(taken[:, None], gradient - self._gradient, 0.0)
        product = (step * change).sum(1)
        curved = product > 1e-10 * change.square().sum(1)
        self._remember(taken, (step, change, torch.where(curved, 1 / product.clamp(min=TINY), 0.0)))
        self._at = self._at + step
        self._gradient = torch.where(taken[:, None], gradient, self._gradient)
        self._losses = torch.where(taken, losses, self._losses)
        longer = torch.where(curved, 1.0, STRETCH * self._length)  # where the slope grows along the way, go on
        self._length = torch.where(taken, longer, self._length)
        self._tries = torch.where(taken, 0, self._tries)
        self._direction = torch.where(taken[:, None], -self._scaled(self._gradient), self._direction)
        self._turn_downhill(taken & ((self._gradient * self._direction).sum(1) >= 0))

    def _remember(self, taken: Tensor, pair: Pair) -> None:
        """One more pair for the images that moved; those that stayed keep all they have."""
        moved, stayed = [*self._pairs, pair], [_nothing(pair), *self._pairs]
        if not bool(taken.all()):
            moved = [_chosen(taken, one, other) for one, other in zip(moved, stayed, strict=True)]
        self._pairs = moved[-MEMORY:]

    def _cut(self, refused: Tensor, losses: Tensor, slope: Tensor) -> None:
        """The next trial is nearer: at the minimum of the parabola through what is known, within limits."""
        rise = (losses - self._losses - slope * self._length).clamp(min=TINY)
        share = (-slope * self._length / (2 * rise)).nan_to_num(0.0).clamp(NEAREST, FURTHEST)
        self._length = torch.where(refused, self._length * share, self._length)
        self._tries = self._tries + refused
        self._turn_downhill(refused & (self._tries % TRIES == 0))

    def _turn_downhill(self, which: Tensor) -> None:
        """Some images forget what they know of the curvature and begin anew along the gradient."""
        if not bool(which.any()):
            return
        first = FIRST * self.lr / self._gradient.abs().amax(1).clamp(min=TINY)
        nearer = NEAREST ** (self._tries // TRIES)  # where even that was no good
        self._pairs = [(step, change, torch.where(which, 0.0, inverse)) for step, change, inverse in self._pairs]
        self._direction = torch.where(which[:, None], -self._gradient, self._direction)
        self._length = torch.where(which, first * nearer, self._length)

    def _scaled(self, gradient: Tensor) -> Tensor:
        """The gradient times the approximate inverse Hessian, by the two loops."""
        found, weights = gradient, []
        for step, change, inverse in reversed(self._pairs):
            weight = inverse * (step * found).sum(1)
            weights.append(weight)
            found = found - weight[:, None] * change
        found = self._curvature()[:, None] * found
        for (step, change, inverse), weight in zip(self._pairs, reversed(weights), strict=True):
            found = found + (weight - inverse * (change * found).sum(1))[:, None] * step
        return found

    def _curvature(self) -> Tensor:
        """The scale of the inverse Hessian, of the latest pair that each image has."""
        scale = torch.ones_like(self._losses)
        for _, change, inverse in self._pairs:
            known = inverse > 0
            scale = torch.where(known, 1 / (inverse * change.square().sum(1)).clamp(min=TINY), scale)
        return scale

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([one.detach().flatten(1) for one in tensors], 1)

    def _place(self, numbers: Tensor) -> None:
        parts = torch.split(numbers, [one[0].numel() for one in self.tensors], 1)
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _nothing(pair: Pair) -> Pair:
    step, change, inverse = pair
    return torch.zeros_like(step), torch.zeros_like(change), torch.zeros_like(inverse)


def _chosen(which: Tensor, one: Pair, other: Pair) -> Pair:
    step, change, inverse = (
        torch.where(which.view(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in zip(one, other, strict=True)
    )
    return step, change, inverse
