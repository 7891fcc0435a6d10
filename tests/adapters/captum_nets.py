"""Small models for the tests of Captum's methods, and gradients by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.handle import Handle

SIZE = (3, 8, 10)
X = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(1))


class Linear(nn.Module):
    """Four outputs, linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class Net(nn.Module):
    """A small network with ReLU modules, one of them in place and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.relu2(self.conv2(x))
        logits: Tensor = self.fc(self.relu2(x - 0.1).mean((2, 3)))
        return logits


def wrapped(module: nn.Module) -> Handle:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tl.wrap(module.eval(), input_size=SIZE)


def gradient(model: Handle, x: Tensor, value: Any) -> Tensor:
    x = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(value(model.module, x).sum(), x)
    return found


def quarters() -> Tensor:
    """Four segments, with gaps in their numbers."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(10), indexing="ij")
    return (rows // 4) * 7 + (columns // 5) * 3 + 2
