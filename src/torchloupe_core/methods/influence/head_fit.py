"""The head fitted again: without some images, with other labels, or to a minimum it has not reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.methods.influence.head import HeadProblem
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT
from torchloupe_core.methods.influence.solvers import conjugate_gradients

__all__ = ["minimum", "refitted"]

STEPS = 30  # with one factor for all fits
NEWTON_STEPS, INNER, HALVINGS = 100, 1_000, 30
CLOSE = 1e-9  # of a typical gradient: the slope at a minimum


def refitted(problem: HeadProblem, removed: Sequence[Sequence[int]], labels: Tensor | None = None) -> Tensor:
    """`[m, P]`: the minimum of the objective without each group of images; NaN where it was not reached.

    labels: `[n]`, to fit in place of the problem's own.

    With damping the objective also holds damping / 2 x squared distance from the model's own parameters, and where
    these are no minimum, what makes them one: minus the gradient there (Bae et al. 2022, If Influence Functions are
    the Answer, Then What is the Question?, section 3). Without either this is leave-one-out training.

    All fits go together with the curvature of the whole set; those that it does not lead to their minimum are made by
    themselves.
    """
    begin, wanted = problem.parameters, problem.labels if labels is None else labels
    kept = torch.ones(len(removed), problem.n, dtype=begin.dtype, device=begin.device)
    for row, group in enumerate(removed):
        kept[row, list(group)] = 0
    found, open_ = begin.expand(len(removed), -1).clone(), torch.ones(len(removed), dtype=torch.bool)
    pull, small = problem.objective_gradient(), CLOSE * problem.typical_gradient / problem.n
    for _ in range(STEPS):
        slope = _slopes(problem, found, kept, wanted) + problem.decay * found + problem.damping * (found - begin) - pull
        open_ = slope.norm(dim=1) > small
        if not open_.any():
            return found
        found = found - open_[:, None] * torch.cholesky_solve(slope.T, problem.factor).T
    for row in open_.nonzero()[:, 0].tolist():
        there = kept[row].bool()
        part = replace(problem, train=problem.train[there], labels=wanted[there])
        held = _Objective(problem.decay, part.n / problem.n, pull, begin, problem.damping, small)
        fitted = _minimised(part, held)
        found[row] = torch.nan if fitted is None else fitted.parameters
    return found


def minimum(problem: HeadProblem) -> HeadProblem:
    """The problem at the minimum of its own objective, or itself if it is there. Raises `NotApplicable`."""
    if problem.size > LARGEST_EXPLICIT:
        raise BadInput(f"a head of {problem.size:,} parameters is not fitted anew; take refit=False")
    zero = torch.zeros_like(problem.parameters)
    found = _minimised(problem, _Objective(problem.decay, 1.0, zero, zero, 0.0, 1e-8 * problem.typical_gradient))
    if found is None:
        raise NotApplicable(
            f"the head's loss has no minimum that {NEWTON_STEPS} steps of Newton's method find from a gradient of "
            f"{problem.objective_gradient().norm().item():.2g}; give a larger weight_decay, or refit=False"
        )
    return found


@dataclass(frozen=True)
class _Objective:
    """share x mean loss + decay / 2 x parameters^2 + damping / 2 x (parameters - anchor)^2 - pull x parameters.

    small: the norm of the slope at which it is at its minimum.
    """

    decay: Tensor
    share: float
    pull: Tensor
    anchor: Tensor
    damping: float
    small: float

    def value(self, problem: HeadProblem) -> Tensor:
        here = problem.parameters
        squares = self.decay * here.square() + self.damping * (here - self.anchor).square()
        loss: Tensor = self.share * problem.loss(problem.logits, problem.labels).mean()
        return loss + squares.sum() / 2 - self.pull @ here

    def slope(self, problem: HeadProblem) -> Tensor:
        here = problem.parameters
        moved = self.decay * here + self.damping * (here - self.anchor)
        return self.share * problem.mean_gradient + moved - self.pull

    def step(self, problem: HeadProblem, slope: Tensor, tolerance: float) -> Tensor:
        """Newton's, to a relative residual."""

        def curved(vectors: Tensor) -> Tensor:
            return self.share * problem.times(vectors) + (self.decay + self.damping + 1e-12) * vectors

        solved = conjugate_gradients(curved, slope[None], tolerance=tolerance, iterations=INNER)
        return solved.vectors[0]


def _minimised(problem: HeadProblem, objective: _Objective) -> HeadProblem | None:
    """The problem at the objective's minimum, by Newton's method and conjugate gradients; None if out of reach."""
    first = objective.slope(problem).norm()
    for _ in range(NEWTON_STEPS):
        slope = objective.slope(problem)
        if slope.norm() <= objective.small:
            return problem
        closer = (slope.norm() / first).item()  # the nearer, the more exact a step: fewer products in all
        problem = _stepped(problem, objective, slope, objective.step(problem, slope, min(0.1, closer)))
    return None


def _stepped(problem: HeadProblem, objective: _Objective, slope: Tensor, step: Tensor) -> HeadProblem:
    """The problem after the longest of the step, half of it, ... that lowers the objective enough."""
    now, share = objective.value(problem), 1.0
    gain = slope @ step
    for _ in range(HALVINGS):
        moved = replace(problem.head, weights=problem.head.weights - share * step.view_as(problem.head.weights))
        there = replace(problem, head=moved)
        if objective.value(there) <= now - 1e-4 * share * gain or gain <= 1e-14:
            return there
        share /= 2
    return there


def _slopes(problem: HeadProblem, parameters: Tensor, kept: Tensor, labels: Tensor) -> Tensor:
    """`[m, P]`: the gradient of the loss of the images kept `[m, n]`, over n, at other parameters and labels."""
    weights = parameters.view(-1, *problem.head.weights.shape)
    total = torch.zeros_like(weights)
    for part in problem.parts_of(len(weights)):
        logits = problem.train[part] @ weights.transpose(1, 2)  # [m, B, K]
        errors = problem.loss.gradient(logits.flatten(0, 1), labels[part].repeat(len(weights))).view_as(logits)
        total += (errors * kept[:, part, None]).transpose(1, 2) @ problem.train[part]
    return total.flatten(1) / problem.n
