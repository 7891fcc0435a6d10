"""Adam against torch's own."""

from __future__ import annotations

import torch

from torchloupe_core.adam import Adam


def test_steps_are_those_of_torch_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 5, generator=generator), torch.randn(3, generator=generator)]
    mine = [one.clone().requires_grad_(True) for one in start]
    torchs = [one.clone().requires_grad_(True) for one in start]
    optimizer, reference = Adam(mine, 0.05), torch.optim.Adam(torchs, lr=0.05, foreach=False)
    for _ in range(50):
        gradients = [torch.randn(one.shape, generator=generator) for one in start]
        optimizer.step(gradients)
        for one, gradient in zip(torchs, gradients, strict=True):
            one.grad = gradient.clone()
        reference.step()
    for one, other in zip(mine, torchs, strict=True):
        assert torch.equal(one, other)
