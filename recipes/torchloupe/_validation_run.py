"""One validation of influence on its way: who trains, what scores are held against, the rows so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchloupe._clean import head_of
from torchloupe._models import at_checkpoint
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.influence import Influence
from torchloupe_core.losses import as_loss
from torchloupe_core.methods.influence import validating
from torchloupe_core.methods.influence.head import HeadProblem
from torchloupe_core.methods.influence.network import NetworkProblem
from torchloupe_core.methods.influence.refits import FittedAnew, HeadRefits, Refits
from torchloupe_core.methods.influence.study import Asked, Study
from torchloupe_core.methods.influence.suspicion import suspicions
from torchloupe_core.validation import COLUMNS

__all__ = ["Counted", "Run", "Trains", "refits_of"]

Trains = Callable[[Tensor, Tensor, int], Any]

NEIGHBORS = 10


@dataclass
class Counted:
    """Refits, and how many trainings they took."""

    refits: Refits
    count: int = 0

    def answers(self, removed: Sequence[Sequence[int]], seeds: int = 1) -> Tensor:
        self.count += len(removed) * seeds
        return self.refits.answers(removed, seeds)

    def model(self, labels: Tensor) -> Handle:
        self.count += 1
        return self.refits.model(labels)


class Run:
    """One validation on its way: scores, what they are held against, the rows so far."""

    def __init__(self, study: Study, refits: Counted, found: Mapping[str, Influence], seed: int, seeds: int) -> None:
        self.study, self.refits, self.names, self.seed, self.seeds = study, refits, tuple(found), seed, seeds
        self.scores = torch.stack([one.scores.double() for one in found.values()])  # [M, T, n]
        self.n = self.scores.shape[2]
        self.before = refits.answers([[]], seeds)[0].cpu().double()  # [T]: the same trainings with all images
        self._table = {name: dict.fromkeys(COLUMNS, math.nan) | {"seconds": one.seconds} for name, one in found.items()}
        self.fields: dict[str, Any] = {}

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        return tuple({"method": name, **row} for name, row in self._table.items())

    def hold(self, kind: str, column: str, removed: Sequence[Sequence[int]]) -> None:
        """Scores against trainings without groups of images."""
        held = validating.foretold(self.refits, self.scores, removed, self.before, self.seeds)
        self.fields |= {f"{kind}_predicted": held.predicted.float(), f"{kind}_actual": held.actual.float()}
        for name, value in zip(self.names, held.spearman, strict=True):
            self._table[name][column] = value

    def remove(self, shares: Sequence[float]) -> None:
        """The most helpful images removed."""
        curves = validating.removal_curves(self.refits, self.scores, shares, self.seed, self.seeds)
        self.fields["removal"] = curves.float()
        for name, curve in zip(self.names, curves, strict=False):
            self._table[name]["removal"] = (curve - curves[-1]).mean().item()

    def mislabel(
        self, asked_of: Mapping[str, Mapping[str, Any]], again: Callable[..., Influence], length: int, wrong: float
    ) -> dict[str, Any]:
        """Wrong labels put in, and looked for."""
        given, outputs = self.study.train_labels, self.study.logits.shape[1]
        if given.is_floating_point() or outputs < 2:
            raise BadInput("labels that are no classes cannot be mistaken; leave 'mislabelled' out of checks")
        labels, truth = validating.flipped(given, outputs, wrong, self.seed)
        every = torch.zeros(length, dtype=torch.long)
        every[self.study.train_indices] = labels
        model = self.refits.model(labels)
        rows = [self._suspicion(again, model, every, options) for options in asked_of.values()]
        found = dict(zip(self.names, rows, strict=True)) | _baselines(model, again, every)
        for name, row in found.items():
            if not torch.isnan(row).any():
                row_of = self._table.setdefault(name, dict.fromkeys(COLUMNS, math.nan))
                row_of["precision"] = validating.precision(row, truth)
        known = dict.fromkeys(found)
        return {"suspicion": torch.stack(list(found.values())).float(), "suspicious": tuple(known), "wrong": truth}

    def _suspicion(
        self, again: Callable[..., Influence], model: Handle, labels: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """`[n]`: how much each training image speaks against the tests, to the model of wrong labels.

        NaN for methods that go along a training: its checkpoints know the labels as they were.
        """
        if "checkpoints" in options:
            return torch.full((self.n,), math.nan, dtype=torch.float64)
        return -again(model, labels=labels, **options).scores.double().sum(0)


def _baselines(model: Handle, again: Callable[..., Influence], labels: Tensor) -> dict[str, Tensor]:
    """The scores of `clean`, where the model ends in a linear layer."""
    told: dict[str, Any] = again.keywords if isinstance(again, partial) else {}
    asked = Asked(as_loss(told["loss"]), None, labels, None, told["weight_decay"], told["damping"], told["seed"])
    try:
        reading = {"workers": told["workers"], "skip_failures": told["skip_failures"]}
        problem = head_of(model, told["train"], asked, lambda done, total: None, **reading)[1]
    except NotApplicable:
        return {}
    return {name.replace("_", "-"): row for name, row in suspicions(problem, NEIGHBORS).items()}


def refits_of(
    study: Study, fit: Trains | None, handle: Handle, seed: int, report: Callable[[int, int], None]
) -> Refits:
    """Who trains: the head in closed form, or the user's function."""
    problem = study.problem
    if isinstance(problem, HeadProblem):
        return HeadRefits(problem)
    if fit is None or not isinstance(problem, NetworkProblem):
        raise BadInput("give fit=, a function that trains")
    trains = fit

    def trained(indices: Tensor, labels: Tensor, number: int) -> Handle:
        return at_checkpoint(handle, trains(indices, labels, number))

    return FittedAnew(trained, problem.tests, problem.asked, study.train_labels, study.train_indices, seed, report)
