"""How suspicious the label of each image of a data set is to a model, by several scores."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.methods.influence.functions import self_influence
from torchloupe_core.methods.influence.head import HeadProblem
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT
from torchloupe_core.nearest import Nearest

__all__ = ["suspicions"]


def suspicions(problem: HeadProblem, k: int) -> dict[str, Tensor]:
    """`[n]` each, larger is more suspicious.

    "loss": of the model for the label. "margin": the largest other logit less the label's own. "self_influence": by how
    much the image's own loss would rise without it (Koh and Liang 2017, section 5.4), through the head; the squared
    norm of its gradient where the head has more than 5,000 parameters. "neighbors": the share of the k nearest images
    by the cosine of what goes into the head that have another label (Papernot and McDaniel 2018, Deep k-Nearest
    Neighbors), and by less than one k-th more the nearer these are. Raises `BadInput` for fewer than two outputs.
    """
    logits, labels = problem.logits, problem.labels
    if logits.shape[1] < 2 or labels.is_floating_point():
        raise BadInput("labels are looked through as classes; this model has one output, or the labels are no classes")
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    itself = self_influence(problem, with_curvature=problem.size <= LARGEST_EXPLICIT)
    found = {
        "loss": problem.loss(logits, labels),
        "margin": others - own,
        "self_influence": itself.scores[0],
        "neighbors": _disagreement(problem, k),
    }
    return {name: values.double().cpu() for name, values in found.items()}


def _disagreement(problem: HeadProblem, k: int) -> Tensor:
    features = problem.train[:, : problem.train.shape[1] - problem.head.biased].float().cpu()
    numbers, labels = torch.arange(len(features)), problem.labels.cpu()
    nearest = Nearest(features, min(k, len(features) - 1), "cosine", numbers)
    nearest.update(features, numbers)
    found, distances = nearest.compute()
    other = (labels[found] != labels[:, None]).double()
    closeness = 1 - distances / 2  # from 0 to 1
    return other.mean(1) + (other * closeness).mean(1) / (found.shape[1] + 1)  # the second part settles ties
