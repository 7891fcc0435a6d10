"""Metrics of the map alone: how much of the image it spreads over."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.metrics.case import Case
from torchloupe_core.registry import method

__all__ = ["complexity", "sparsity"]


@method(
    "compare",
    "sparsity",
    better="higher",
    any_scale=True,
    cost="no forward",
    paper="Chalasani et al. 2020, Concise Explanations, section 2 (Gini)",
)
def sparsity(case: Case) -> Tensor:
    """The Gini index of the magnitudes: 0 where all pixels matter alike, towards 1 where few do."""
    ordered = case.maps.flatten(1).double().abs().sort(1).values
    count = ordered.shape[1]
    weights = 2 * torch.arange(1, count + 1) - count - 1.0
    total = ordered.sum(1)
    return ((ordered * weights).sum(1) / (count * total)).float()


@method(
    "compare",
    "complexity",
    better="lower",
    any_scale=True,
    cost="no forward",
    paper="Bhatt et al. 2020, Evaluating and Aggregating, definition 3",
)
def complexity(case: Case) -> Tensor:
    """The entropy of the magnitudes as shares of their sum, in nats; log(H W) for an even map."""
    sizes = case.maps.flatten(1).double().abs()
    shares = sizes / sizes.sum(1, keepdim=True)
    entropies: Tensor = torch.special.entr(shares).sum(1)
    return entropies.float()
