"""Cases for metrics: images, maps, and models whose true contributions are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.metrics.case import Case
from torchloupe_core.query import Query


class Additive(nn.Module):
    """Two outputs: a weighted sum of the pixels, and zero."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        found = (x * self.weights).sum((1, 2, 3))
        return torch.stack([found, torch.zeros_like(found)], 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case_of(model: nn.Module, inputs: Tensor, maps: Tensor, target: Any = "logit:0", **more: Any) -> Case:
    handle = tl.wrap(model.eval(), input_size=tuple(inputs.shape[1:]))
    return Case(Query(handle, inputs, handle.bind(target, inputs)), maps, **more)
