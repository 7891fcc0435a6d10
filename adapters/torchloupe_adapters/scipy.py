"""SciPy: assigning things to places at the least total cost."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.errors import MissingDependency
from torchloupe_core.registry import method

__all__ = ["assign"]


@method("assign", "scipy.linear_sum_assignment", cost="N^3 at worst", paper="Crouse 2016, 2D rectangular assignment")
def assign(costs: Tensor) -> Tensor:
    """For each row of `costs [N, M]`, N at most M, a column of its own, `[N]`, such that the sum is the least."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingDependency.of("scipy", None) from error
    _, columns = linear_sum_assignment(costs.numpy())
    return torch.from_numpy(columns)
