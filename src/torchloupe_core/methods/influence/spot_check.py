"""Influence held against the truth: a few training images really removed, the head fitted again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchloupe_core.methods.influence.head import HeadProblem
from torchloupe_core.methods.influence.head_fit import refitted
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT

__all__ = ["pearson", "ranks", "spearman", "spot_check", "strongest"]

STATIONARY = 0.05  # of a training image's gradient: the mean gradient of a model at the minimum of its loss


def spot_check(problem: HeadProblem, scores: Tensor, count: int, seed: int) -> dict[str, Any] | None:
    """How the scores `[T, n]` of some training images compare with refits of the head without each of them.

    Half of the images are those with the largest scores, the rest is drawn at random. One row of scores for no test
    image is each training image's influence on itself. None where P is too large to refit cheaply.
    """
    if problem.size > LARGEST_EXPLICIT:
        return None
    chosen = _chosen(scores, min(count, problem.n), seed)
    fits = refitted(problem, [[index] for index in chosen])
    there = ~fits.isnan().any(1)
    chosen = [index for index, good in zip(chosen, there.tolist(), strict=True) if good]
    if scores.shape[0] == len(problem.tests):
        actual = (problem.support(fits[there]) - problem.support(problem.parameters[None])).T  # [T, m]
    else:
        actual = problem.own_loss(fits[there], chosen)[None]
    predicted = scores[:, chosen]
    return {
        "removed": chosen,
        "not_reached": int((~there).sum()),
        "spearman": _mean([spearman(a, b) for a, b in zip(predicted, actual, strict=True)]),
        "pearson": _mean([pearson(a, b) for a, b in zip(predicted, actual, strict=True)]),
        "slope": _slope(predicted, actual),
        "actual": actual.tolist(),
    }


def spearman(first: Tensor, second: Tensor) -> float:
    """The rank correlation of two rows of numbers; equal numbers share their mean rank."""
    return pearson(ranks(first), ranks(second))


def ranks(values: Tensor) -> Tensor:
    """The rank of each number from 0; equal ones have the mean of theirs."""
    values, below = values.contiguous(), torch.searchsorted
    ordered = values.sort().values
    return (below(ordered, values).double() + below(ordered, values, right=True).double() - 1) / 2


def strongest(scores: Tensor) -> Tensor:
    """`[n]`: columns by the largest share that any row's score has of that row's largest."""
    shares = (scores.abs() / scores.abs().amax(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)).amax(0)
    return shares.argsort(descending=True, stable=True)


def _chosen(scores: Tensor, count: int, seed: int) -> list[int]:
    first = strongest(scores)[: count // 2].tolist()
    drawn = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed)).tolist()
    taken = set(first)
    return sorted([*first, *[one for one in drawn if one not in taken][: count - len(first)]])


def pearson(first: Tensor, second: Tensor) -> float:
    """The linear correlation of two rows of numbers; NaN where one does not vary."""
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = a.norm() * b.norm()
    return (a @ b / scale).item() if scale > 0 else float("nan")


def _slope(predicted: Tensor, actual: Tensor) -> float:
    """By what the scores would have to be multiplied to fit the actual changes best."""
    squares = predicted.square().sum()
    return ((predicted * actual).sum() / squares).item() if squares > 0 else float("nan")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
