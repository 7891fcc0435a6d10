"""Influence from several states of a training: gradients along it (TracIn), and random projections of them (TRAK)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.identity import of_model
from torchloupe_core.memory import require
from torchloupe_core.methods.influence.problem import Answer, Problem
from torchloupe_core.registry import method

__all__ = ["Checkpoint", "Projection", "along", "rates_of", "tracin", "trak"]

Checkpoint = Callable[[], Handle]  # opens the model as it was

STEPS = "the sum over checkpoints of the rate times the change that a step without the training image would make"
PROJECTED = (
    "proportional to the change when the training image is removed, as a linear model of projected gradients has it"
)
FEW = 16  # dimensions of a projection, unless there are hardly any images
RIDGE = 1e-6  # of the mean diagonal, so that a kernel of few images can be inverted


@method(
    "influence",
    "tracin",
    needs=("checkpoints",),
    cost="1 pass for each checkpoint",
    paper="Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient Descent, eq. 2 (TracInCP)",
)
def tracin(problem: Problem, *, checkpoints: Sequence[Checkpoint] = (), rates: Sequence[float] | float = 1.0) -> Answer:
    """The dot products of the gradients at several checkpoints of the training, each times its learning rate, over n.

    checkpoints: files, state dicts, modules. rates: of the epochs around each. Raises `BadInput` without checkpoints:
    the model as it is alone is method="gradient_dot".
    """
    weights = rates_of(checkpoints, rates)
    scores: Any = 0.0
    for there, rate in zip(along(problem, checkpoints), weights, strict=True):
        scores = scores + rate * there.dots(there.questions) / there.n
    return Answer(scores, STEPS, diagnostics={"checkpoints": len(checkpoints), "rates": weights})


@method(
    "influence",
    "trak",
    cost="1 pass for each model, at its own parameters or at each checkpoint",
    paper="Park et al. 2023, TRAK: Attributing Model Behavior at Scale",
    random=True,
)
def trak(problem: Problem, *, dims: int | None = None, checkpoints: Sequence[Checkpoint] = ()) -> Answer:
    """A linear model on random projections of the gradients of log(p / (1 - p)), p the probability of the label.

    dims: of the projection, one for 16 training images unless given, at most 2,048; many more fit noise. checkpoints:
    of other trainings, or other epochs; kernels and errors are averaged over them, as in the paper (section 3.2, step
    5). The model itself counts only without checkpoints. For the cross-entropy alone.
    """
    if problem.loss.kind != "cross_entropy":
        raise NotApplicable(
            f"trak is made for the cross-entropy; the loss is {problem.loss.name}; take 'cg' or 'ekfac'"
        )
    dims = max(1, min(FEW, problem.n // 4), min(2048, problem.n // 16)) if dims is None else dims
    if dims < 1:
        raise BadInput(f"dims is at least 1; got {dims}")
    kernels: Any = 0.0
    doubts: Any = 0.0
    models = max(1, len(checkpoints))
    for number, there in enumerate(along(problem, checkpoints) if checkpoints else [problem]):
        projection = Projection(there.size, dims, there.parameters, problem.seed + number)
        kernel, doubt = _kernel(there, projection)
        kernels, doubts = kernels + kernel / models, doubts + doubt / models
    return Answer(kernels * doubts, PROJECTED, diagnostics={"dims": min(dims, problem.size), "models": models})


def rates_of(checkpoints: Sequence[Checkpoint], rates: Sequence[float] | float) -> list[float]:
    """The learning rate of each checkpoint. Raises `BadInput` without checkpoints."""
    if not checkpoints:
        raise BadInput("tracin goes along a training; give checkpoints=[...], or take method='gradient_dot'")
    found = [float(rates)] * len(checkpoints) if isinstance(rates, (int, float)) else [float(one) for one in rates]
    if len(found) != len(checkpoints) or not all(0 <= one < float("inf") for one in found):
        raise BadInput(f"rates are numbers of at least 0, one for each of {len(checkpoints)} checkpoints; got {rates}")
    return found


class Projection:
    """P numbers to `dims`, lengths and angles kept on average: each goes to 4 places, with random signs.

    Sparse random projections (Achlioptas 2003; Kane and Nelson 2014): four times P numbers to keep, whatever dims is.
    Where there are no more than `dims` numbers they stay as they are.
    """

    PLACES = 4

    def __init__(self, size: int, dims: int, like: Tensor, seed: int) -> None:
        self.dims, self.whole = min(dims, size), size <= dims
        if self.whole:
            return
        require(2 * 8 * self.PLACES * size, f"a projection of {size:,} parameters", like.device)
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(0, dims, (self.PLACES, size), generator=generator)
        signs = torch.randint(0, 2, (self.PLACES, size), generator=generator)
        self.places = places.to(like.device)
        self.signs = (2 * signs - 1).to(like) / self.PLACES**0.5

    def __call__(self, rows: Tensor) -> Tensor:
        """`[m, dims]` of rows `[m, P]`."""
        if self.whole:
            return rows
        found = rows.new_zeros(len(rows), self.dims)
        for places, signs in zip(self.places, self.signs, strict=True):
            found.index_add_(1, places, rows * signs)
        return found


def _kernel(problem: Problem, projection: Projection) -> tuple[Tensor, Tensor]:
    """`[T, n]`: what each training image's margin does to each question, and `[n]`, one minus its probability."""
    if problem.lasting is None:
        found = [_projected(problem, projection)]
    else:
        parts = problem.lasting.each(
            "projections", problem, problem.n, lambda whole, part: _projected(whole.within(part), projection)
        )
        found = [arrays for _, arrays in parts]
    features, doubt = (torch.cat([one[name] for one in found]).to(problem.parameters) for name in ("features", "doubt"))
    gram = features.T @ features
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    if problem.given_damping:
        gram.diagonal().add_(problem.given_damping * problem.n)
    asked = projection(problem.questions)
    solved = torch.linalg.solve(gram, asked.T).T
    return -solved @ features.T, doubt


def _projected(problem: Problem, projection: Projection) -> dict[str, Tensor]:
    """Of each training image the projected gradient of its margin, and one minus its probability."""
    parts, doubts, latest = [], [], torch.empty(0)

    def margins(logits: Tensor, labels: Tensor) -> Tensor:  # asked once or twice for a block
        nonlocal latest
        latest = 1 - logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return _margin_slopes(logits, labels)[:, None]

    for _, rows in problem.passes(margins):
        parts.append(projection(rows[:, 0]))
        doubts.append(latest)
    return {"features": torch.cat(parts), "doubt": torch.cat(doubts)}


def _margin_slopes(logits: Tensor, labels: Tensor) -> Tensor:
    """`[N, K]`: the derivative of log(p / (1 - p)), the label's logit less the log-sum-exp of the others."""
    own = F.one_hot(labels, logits.shape[1])
    others = logits.masked_fill(own.bool(), -torch.inf).softmax(1)
    return own - others


def along(problem: Problem, checkpoints: Sequence[Checkpoint]) -> Iterator[Problem]:
    """The same question at each checkpoint, its model borrowed meanwhile."""
    for place, checkpoint in enumerate(checkpoints):
        handle = checkpoint()
        with handle.borrow():
            there = problem.elsewhere(handle)
            if problem.lasting is not None:
                there.lasting = problem.lasting.at(f"-{place + 1}", of_model(handle))
            yield there
        problem.report(place + 1, len(checkpoints))
