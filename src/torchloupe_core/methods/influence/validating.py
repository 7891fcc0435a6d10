"""How well scores foretell what trainings without some images come to: the measures of `validate_influence`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.methods.influence.refits import Refits
from torchloupe_core.methods.influence.spot_check import pearson, spearman, strongest

__all__ = ["Foretold", "flipped", "foretold", "halves", "precision", "removal_curves", "single_images", "strong_groups"]

DRAWS = 4  # random removals that a curve is held against


@dataclass(frozen=True)
class Foretold:
    """Groups of training images removed: `predicted [M, T, g]` by M methods, `actual [T, g]` after refits."""

    predicted: Tensor
    actual: Tensor

    @property
    def spearman(self) -> list[float]:
        """The rank correlation over groups of each method, the mean over tests."""
        return [_mean([spearman(*pair) for pair in zip(one, self.actual, strict=True)]) for one in self.predicted]

    @property
    def pearson(self) -> list[float]:
        """The linear correlation over groups of each method, the mean over tests."""
        return [_mean([pearson(*pair) for pair in zip(one, self.actual, strict=True)]) for one in self.predicted]


def foretold(refits: Refits, scores: Tensor, groups: Sequence[Sequence[int]], before: Tensor, seeds: int) -> Foretold:
    """What scores `[M, T, n]` say of removing groups of columns, and what it does to the questions `before [T]`."""
    predicted = torch.stack([scores[:, :, list(group)].sum(2) for group in groups], 2)
    return Foretold(predicted.double(), (refits.answers(groups, seeds).cpu().double() - before).T)


def single_images(scores: Tensor, count: int, seed: int) -> list[list[int]]:
    """Training images to leave out one by one: half those of the largest scores of each method in turn, half drawn."""
    turns = [strongest(one).tolist() for one in scores]
    first = list(dict.fromkeys(column for turn in zip(*turns, strict=True) for column in turn))[: count // 2]
    drawn = torch.randperm(scores.shape[2], generator=torch.Generator().manual_seed(seed)).tolist()
    rest = [one for one in drawn if one not in set(first)]
    return [[one] for one in sorted([*first, *rest[: count - len(first)]])]


def strong_groups(scores: Tensor, count: int, k: int, seed: int) -> list[list[int]]:
    """Groups of k training images: a third the most helpful of a test, a third the most harmful, a third drawn.

    scores: `[M, T, n]`; methods and tests take turns.
    """
    generator, groups = torch.Generator().manual_seed(seed), []
    for number in range(count):
        method, test = number // 3 % scores.shape[0], number // 3 // scores.shape[0] % scores.shape[1]
        ordered = scores[method, test].argsort(descending=number % 3 == 0, stable=True)
        if number % 3 == 2:
            ordered = torch.randperm(scores.shape[2], generator=generator)
        groups.append(sorted(ordered[:k].tolist()))
    return groups


def halves(n: int, count: int, share: float, seed: int) -> list[list[int]]:
    """Random groups to remove, so that a share of the n columns is left."""
    generator = torch.Generator().manual_seed(seed)
    removed = n - max(1, round(share * n))
    return [torch.randperm(n, generator=generator)[:removed].sort().values.tolist() for _ in range(count)]


def flipped(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of which a share are another class, drawn at random, and which these are, `[n]` each."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[: max(1, round(share * len(labels)))]] = True
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return torch.where(wrong, (labels + shift) % classes, labels), wrong


def precision(suspicion: Tensor, wrong: Tensor, k: int | None = None) -> float:
    """The share of wrong labels among the k most suspicious, as many as there are wrong ones unless given."""
    first = suspicion.argsort(descending=True, stable=True)[: k or int(wrong.sum())]
    return wrong[first].double().mean().item()


def removal_curves(refits: Refits, scores: Tensor, shares: Sequence[float], seed: int, seeds: int) -> Tensor:
    """`[M + 1, s]`: the mean question after removing a share of the images, the most helpful to all tests first.

    The last row is of images drawn at random, the mean of 4 draws.
    """
    generator, n = torch.Generator().manual_seed(seed), scores.shape[2]
    orders = [one.sum(0).argsort(descending=True, stable=True).tolist() for one in scores]
    orders += [torch.randperm(n, generator=generator).tolist() for _ in range(DRAWS)]
    groups = [order[: math.ceil(share * n)] for order in orders for share in shares]
    found = refits.answers(groups, seeds).cpu().double().mean(1).view(len(orders), len(shares))
    return torch.cat([found[:-DRAWS], found[-DRAWS:].mean(0, keepdim=True)])


def _mean(values: Sequence[Any]) -> float:
    """Of what is no NaN."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
