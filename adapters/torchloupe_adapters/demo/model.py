"""A small residual network for the demo scenes: 494,276 parameters, last feature map 8x8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchloupe_adapters.demo.scenes import CLASSES

__all__ = ["MEAN", "STD", "SceneNet", "normalise"]

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)


def normalise(images: Tensor) -> Tensor:
    """uint8 images `[N, 3, H, W]` to what `SceneNet` reads."""
    mean = torch.tensor(MEAN, device=images.device)[:, None, None]
    std = torch.tensor(STD, device=images.device)[:, None, None]
    return (images.float() / 255 - mean) / std


class Block(nn.Module):
    """Basic residual block (He et al. 2016, figure 2); each ReLU is a module of its own, so each can be hooked."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if channels != width or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(x)) + shortcut)
        return out


class SceneNet(nn.Module):
    """Logits `[N, 12]` of normalised scenes `[N, 3, 64, 64]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 5, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        self.layer1 = Block(24, 32, 1)
        self.layer2 = Block(32, 64, 2)
        self.layer3 = Block(64, 96, 2)
        self.layer4 = Block(96, 128, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # [N, 24, 32, 32]
        x = self.layer2(self.layer1(x))  # [N, 64, 16, 16]
        x = self.layer4(self.layer3(x))  # [N, 128, 8, 8]
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
