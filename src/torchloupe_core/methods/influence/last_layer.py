"""Cheaper answers from the last layer alone: similar features, and representer points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.methods.influence.head import HeadProblem
from torchloupe_core.methods.influence.head_fit import minimum
from torchloupe_core.methods.influence.problem import Answer, Problem
from torchloupe_core.registry import method

__all__ = ["feature_cosine", "representer"]

COSINE = "the cosine of the features that go into the head"
SHARE = "what the training image adds to what is asked about, through the logits that it has a share in"
ALIKE = "positive: the image looks alike to the model; neither label takes part"


@method(
    "influence",
    "feature_cosine",
    needs=("linear_head",),
    cost="1 pass",
    paper="Hanawa et al. 2021, Evaluation of Similarity-based Explanations",
)
def feature_cosine(problem: Problem) -> Answer:
    """The cosine of what goes into the head, without its bias: which training images look alike to the model."""
    head = _head_of(problem, "feature_cosine")
    width = head.train.shape[1] - head.head.biased
    rows, tests = (_unit(features[:, :width]) for features in (head.train, head.tests))
    return Answer(tests @ rows.T, COSINE, sign=ALIKE)


@method(
    "influence",
    "representer",
    needs=("linear_head",),
    cost="1 pass + Newton's method on the head where it is at no minimum",
    paper="Yeh et al. 2018, Representer Point Selection for Explaining Deep Neural Networks, theorem 3.1",
)
def representer(problem: Problem, *, refit: bool = True) -> Answer:
    """The test's logits as a sum over training images, and each one's share in what is asked about.

    At a minimum with weight decay the head's weights are the sum of -1/(weight_decay n) x the error of each training
    image x its features. Where the model is at none the head is fitted anew, as in the paper, unless refit=False; how
    far the sum is from the weights, and how many tests are then taken for another class, is in the diagnostics. Raises
    `BadInput` without weight decay.
    """
    head = _head_of(problem, "representer")
    if not head.decayed:
        raise BadInput("representer points need the weight_decay of the training, as weight_decay=1e-3")
    asked = minimum(head) if refit else head
    decay = asked.decay.view_as(asked.head.weights)[0]  # of each feature, the same for all classes
    inverse = torch.where(decay > 0, 1 / decay.where(decay > 0, 1.0), 0.0)
    kernel = (asked.tests * inverse) @ asked.train.T / asked.n  # [T, n]
    slopes = asked.asked.slopes(asked.head.logits(asked.tests))
    free = decay.expand_as(asked.head.weights).flatten() == 0
    gap = asked.objective_gradient().where(~free, 0.0) / asked.decay.where(~free, 1.0)
    before, after = (one.head.logits(one.tests).argmax(1) for one in (head, asked))
    facts: dict[str, Any] = {
        "refitted": asked is not head,
        "representation_error": (gap.norm() / asked.parameters.where(~free, 0.0).norm()).item(),
        "tests_changed": int((before != after).sum()),
    }
    return Answer(kernel * (slopes @ asked.errors.T), SHARE, diagnostics=facts)


def _head_of(problem: Problem, name: str) -> HeadProblem:
    if not isinstance(problem, HeadProblem):
        raise BadInput(f"{name!r} reads the head alone; leave layers= out")
    return problem


def _unit(features: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / norms.where(norms > 0, 1.0)
