"""Removing a training image from the head's objective by one whole step of Newton's method."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.methods.influence.head import HeadProblem

__all__ = ["newton_removal"]


def newton_removal(problem: HeadProblem) -> Tensor:
    """`[T, n]`: by how much each question changes after one step of Newton's method without each training image.

    With G the inverse of the damped Hessian, M the feature of a training image in each class's row, W and g the second
    and first derivative of its loss by its logits: step = G M (1 - W M'GM / n)^-1 g / n (Woodbury). It is taken in
    whole, so that the change is that of the question itself. For the squared loss it is leave-one-out exactly: the
    factor is 1 / (1 - leverage) (Cook 1977, Detection of Influential Observation in Linear Regression).
    """
    inverse = torch.cholesky_inverse(problem.factor).view(*problem.head.weights.shape, *problem.head.weights.shape)
    before = problem.support(problem.parameters)[0]  # [T]
    scores = [_of_some(problem, inverse, before, part) for part in problem.parts_of(problem.size)]
    return torch.cat(scores, 1)


def _of_some(problem: HeadProblem, inverse: Tensor, before: Tensor, part: slice) -> Tensor:
    """`[T, B]`: the changes when each of some training images is removed."""
    features, logits, labels = problem.train[part], problem.logits[part], problem.labels[part]
    classes = logits.shape[1]
    spread = torch.einsum("kdle,be->bkdl", inverse, features)  # GM, [B, K, D, K]
    leverage = torch.einsum("bkdl,bd->bkl", spread, features) / problem.n  # M'GM / n
    remaining = torch.eye(classes).to(leverage) - problem.loss.curvature(logits, labels) @ leverage
    pulled = torch.linalg.solve(remaining, problem.errors[part][:, :, None])[:, :, 0] / problem.n  # [B, K]
    steps = torch.einsum("bkdl,bl->bkd", spread, pulled)
    rows = []
    for row, (test, was) in enumerate(zip(problem.tests, before, strict=True)):
        moved = problem.head.weights @ test + torch.einsum("bkd,d->bk", steps, test)
        rows.append(problem.asked.of(moved, torch.full((len(moved),), row)) - was)
    return torch.stack(rows)
