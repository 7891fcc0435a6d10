"""A model whose device holds three images at most, and what every method must do about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchloupe as tl


class Small(nn.Module):
    """A model whose device holds as many images as it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.most = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3), 10**6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found: torch.Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return found


def goes_on_in_smaller_batches(method: str, batch_size: int | None, options: dict[str, Any]) -> None:
    """Asserts that a method halves its batches where the memory ends, and answers the same."""
    images = torch.randn(7, 3, 16, 16)
    roomy, small = (tl.wrap(Small(), input_size=(3, 16, 16)) for _ in range(2))
    try:
        expected = tl.explain(roomy, images, target=1, method=method, batch_size=2, **options)
    except tl.errors.NotApplicable:
        pytest.skip("not for this model")
    assert small.layers  # traced with two images
    small.module.most = 3
    found = tl.explain(small, images, target=1, method=method, batch_size=batch_size, **options)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-6)
