"""The networks that costs are taken on, with random weights, which costs do not depend on, and their bare passes."""

from __future__ import annotations

import torch
import torchvision
from measuring import Steps
from torch import Tensor, nn

BATCH, CLASS, SIZE = 8, 207, 224


def network(name: str = "resnet50") -> nn.Module:
    """One of torchvision's, its parameters frozen."""
    torch.manual_seed(0)
    module: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    return module.requires_grad_(False)


def noise(n: int = BATCH, size: int = SIZE) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def forward(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(images)
        return logits


def backward(module: nn.Module, images: Tensor) -> Tensor:
    """A forward pass, and one back to the input."""
    inputs = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(module(inputs)[:, CLASS].sum(), inputs)
    return gradient


def passes_to(module: nn.Module, layer: str, images: int = 1) -> Steps:
    """Forward and backward passes to the image, through a resnet's layers up to the last one needed."""
    names = [name for name, _ in module.named_children()]
    stages = list(module.children())[: names.index(layer) + 1]
    part = nn.Sequential(*stages[:-1], nn.Flatten(), stages[-1]) if layer == "fc" else nn.Sequential(*stages)

    def work(steps: int) -> None:
        x = noise(images).requires_grad_(True)
        for _ in range(steps):
            torch.autograd.grad(part(x)[:, 11].mean(), x)

    return work
