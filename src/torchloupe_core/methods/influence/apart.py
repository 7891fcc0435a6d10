"""A problem as other libraries want it: a copy of the model, and the images in one tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.methods.influence.network import NetworkProblem
from torchloupe_core.methods.influence.problem import Problem
from torchloupe_core.methods.influence.training_images import TrainingImages

__all__ = ["Copied", "added_of", "images_of", "through_the_model"]

AT_ONCE = 64


class Copied(nn.Module):
    """A copy of the model that gives logits; the parameters asked about, and only they, are free."""

    def __init__(self, problem: NetworkProblem) -> None:
        super().__init__()
        self.model = copy.deepcopy(problem.handle.module)
        self.logits: Callable[[Any], Tensor] = problem.handle.logits
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in problem.model_gradients.names)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits(self.model(inputs.clone()))


def through_the_model(problem: Problem, library: str) -> NetworkProblem:
    """The problem, if it is one that another library can be asked. Raises `NotApplicable`."""
    if not isinstance(problem, NetworkProblem):
        raise BadInput(f"the methods of {library} go through the model")
    if problem.asked.inner:
        raise NotApplicable(
            f"{library} asks about the model's output, and the target reads layer {problem.asked.inner[0]!r}; take a "
            "native method, as 'cg'"
        )
    return problem


def added_of(problem: Problem, library: str) -> float:
    """Weight decay and damping as the one number that libraries add to the curvature of the mean loss."""
    if bool((problem.decay != problem.decay[0]).any()):
        raise BadInput(f"{library} adds one number to the curvature; give one weight_decay for all parameters")
    return float(problem.decay[0]) + problem.damping


def images_of(images: TrainingImages, library: str) -> Tensor:
    """`[n, C, H, W]`: all of them. Raises `NotApplicable` where they differ in size."""
    if images.scanned.others:
        raise NotApplicable(f"{library} takes images of one size; resize them, or take a native method, as 'cg'")
    return torch.cat([block.inputs for block in images.blocks(AT_ONCE)])
