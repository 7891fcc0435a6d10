"""Tiny models whose outputs are not `[N, K]` logits: class maps, detections, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.spec import Spec

SIZE = (8, 12)
X = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
REFERENCE = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(3))


class Segmenter(nn.Module):
    """Class maps `[N, 3, H, W]`, or `[N, 3, H/2, W/2]`, in a form chosen by `form`."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda maps: maps, stride: int = 1) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2) if stride == 1 else nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.form = nn.Conv2d(4, 3, 1), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(self.up(self.deep(self.down(x).relu()).relu()).relu()))


PLACES = ((0.0, 0.0, 4.0, 5.0), (5.0, 2.0, 12.0, 8.0), (1.0, 1.0, 4.0, 6.0))  # left, top, right, bottom
LABELS = (1, 2, 1)


class Detector(nn.Module):
    """Three detections, whose scores and right edges follow the image; those with a score under `least` are dropped."""

    def __init__(self, least: float = 0.0) -> None:
        super().__init__()
        self.conv, self.fc, self.least = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 6), least

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [self.one(found) for found in self.fc(self.conv(x).relu().mean((2, 3))).sigmoid()]

    def one(self, found: Tensor) -> dict[str, Tensor]:
        scores, boxes = found[:3], torch.tensor(PLACES, dtype=found.dtype)
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:3] + found[3:, None], boxes[:, 3:]], 1)
        kept = scores >= self.least
        return {"boxes": boxes[kept], "labels": torch.tensor(LABELS)[kept], "scores": scores[kept]}


class Embedder(nn.Module):
    """An embedding `[N, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, 2, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return embedding


def handle(kind: type[nn.Module], *given: Any, classes: tuple[str, ...] | None = None, **facts: Any) -> tl.Handle:
    torch.manual_seed(0)
    return tl.Handle(kind(*given).eval(), Spec(input_size=(3, *SIZE), classes=classes, **facts))


def outputs_of(model: tl.Handle, x: Tensor = X) -> Any:
    with torch.no_grad():
        return model.module(x)
