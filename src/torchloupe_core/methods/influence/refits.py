"""Trainings that leave training images out: of the head, found exactly, or by a function of the user's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.methods.influence.head import HeadProblem
from torchloupe_core.methods.influence.head_fit import refitted
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT
from torchloupe_core.methods.influence.questions import Questions
from torchloupe_core.methods.influence.study import logits_of
from torchloupe_core.methods.influence.training_images import TrainingImages

__all__ = ["Fit", "FittedAnew", "HeadRefits", "Refits"]

Fit = Callable[[Tensor, Tensor, int], Handle]  # of training images by index [m], their labels [m], and a seed

TOGETHER = 16  # heads fitted side by side


class Refits(Protocol):
    """Models trained on some of n training images, and what they say of T tests."""

    def answers(self, removed: Sequence[Sequence[int]], seeds: int = 1) -> Tensor:
        """`[m, T]`: the question of each test after trainings without each group of columns, the mean of seeds."""

    def model(self, labels: Tensor) -> Handle:
        """The model after a training on all images with other labels `[n]`."""


@dataclass
class HeadRefits:
    """The head fitted again from where it is, to the minimum of its objective: as `refitted`.

    Raises `NotApplicable` for a head that is too large.
    """

    problem: HeadProblem

    def __post_init__(self) -> None:
        if self.problem.size > LARGEST_EXPLICIT:
            raise NotApplicable(
                f"a head of {self.problem.size:,} parameters is not fitted again here, only up to "
                f"{LARGEST_EXPLICIT:,}; give fit=, a function that trains"
            )

    def answers(self, removed: Sequence[Sequence[int]], seeds: int = 1) -> Tensor:
        """`[m, T]`; no chance takes part, so one seed is as good as many."""
        parts = [self._fitted(removed[begin : begin + TOGETHER]) for begin in range(0, len(removed), TOGETHER)]
        return self.problem.support(torch.cat(parts))

    def model(self, labels: Tensor) -> Handle:
        """A copy of the model, its head fitted to other labels."""
        problem = self.problem
        weights = self._fitted([[]], labels.to(problem.labels.device)).view_as(problem.head.weights)
        module = copy.deepcopy(problem.handle.module)
        head = module.get_submodule(problem.head.name)
        width = weights.shape[1] - problem.head.biased
        with torch.no_grad():
            head.get_parameter("weight").copy_(weights[:, :width].view(head.get_parameter("weight").shape))
            if problem.head.biased:
                head.get_parameter("bias").copy_(weights[:, -1])
        return Handle(module, problem.handle.spec)

    def _fitted(self, removed: Sequence[Sequence[int]], labels: Tensor | None = None) -> Tensor:
        found = refitted(self.problem, removed, labels)
        if found.isnan().any():
            count = int(found.isnan().any(1).sum())
            raise NotApplicable(
                f"{count} of {len(found)} fits of the head found no minimum: without weight decay or damping there may "
                "be none; give the weight_decay of the training, or more damping"
            )
        return found


@dataclass
class FittedAnew:
    """Models that a user's function trains.

    tests: opened with the model that was asked about. labels, indices: `[n]`, of the columns, in the training set.
    seed: of the first training; the others count up.
    """

    fit: Fit
    tests: TrainingImages
    asked: Questions
    labels: Tensor
    indices: Tensor
    seed: int = 0
    report: Callable[[int, int], None] = lambda done, total: None

    def answers(self, removed: Sequence[Sequence[int]], seeds: int = 1) -> Tensor:
        """`[m, T]`, each the mean over trainings with so many seeds."""
        rows = []
        for number, group in enumerate(removed):
            kept = torch.ones(len(self.indices), dtype=torch.bool)
            kept[list(group)] = False
            rows.append(torch.stack([self._trained(kept, self.seed + one) for one in range(seeds)]).mean(0))
            self.report(number + 1, len(removed))
        return torch.stack(rows)

    def model(self, labels: Tensor) -> Handle:
        """As the function trains it on other labels."""
        return self.fit(self.indices, labels, self.seed)

    def _trained(self, kept: Tensor, seed: int) -> Tensor:
        """`[T]`: the question of each test after one training."""
        handle = self.fit(self.indices[kept], self.labels[kept], seed)
        rows = []
        with handle.borrow():
            for block in self.tests.blocks(64):
                logits = logits_of(handle, block.inputs.to(handle.device, handle.dtype)).cpu()
                rows.append(self.asked.of(logits.double(), torch.arange(block.part.start, block.part.stop)))
        found = torch.cat(rows)
        if not found.isfinite().all():
            raise BadInput(f"the model that fit= trained on {int(kept.sum())} images gives NaN or infinity")
        return found
