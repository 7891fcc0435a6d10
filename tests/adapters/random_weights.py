"""Random weights at the speed of a copy: what makes it possible to build nearly two hundred models in one test file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

POOL = 1_000_003  # a prime, so that no two rows of a weight are alike


class QuickInitialisation(TorchFunctionMode):
    """Inside, `normal_` and `uniform_` copy from a pool of numbers drawn once, scaled as asked.

    Truncated normals become uniform ones, since `erfinv_` does nothing. Nothing else about a model changes.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.normal, self.uniform = torch.randn(POOL, generator=generator), torch.rand(POOL, generator=generator)
        self.start = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.normal_:
            return self._normal(*args, **(kwargs or {}))
        if func is Tensor.uniform_:
            return self._uniform(*args, **(kwargs or {}))
        if func is Tensor.erfinv_:
            return args[0]
        return func(*args, **(kwargs or {}))

    def _normal(self, tensor: Tensor, mean: float = 0, std: float = 1, *, generator: Any = None) -> Tensor:
        return self._copy(tensor, self.normal).mul_(std).add_(mean)

    def _uniform(self, tensor: Tensor, low: float = 0, high: float = 1, *, generator: Any = None) -> Tensor:
        return self._copy(tensor, self.uniform).mul_(high - low).add_(low)

    def _copy(self, tensor: Tensor, pool: Tensor) -> Tensor:
        flat = tensor.view(-1) if tensor.is_contiguous() else torch.empty(tensor.numel())
        done = 0
        while done < len(flat):
            part = pool[self.start : self.start + len(flat) - done]
            flat[done : done + len(part)] = part
            done, self.start = done + len(part), (self.start + len(part)) % POOL
        return tensor if tensor.is_contiguous() else tensor.copy_(flat.view(tensor.shape))
