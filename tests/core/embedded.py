"""An embedding made of points, for tests of what is made of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import torchloupe_adapters  # noqa: F401  (says where the solver and the templates live)
from torchloupe_core.embedding import Embedding


def embedding(points: Tensor, **facts: Any) -> Embedding:
    """Of these points; everything else is as little as can be, unless given."""
    given: dict[str, Any] = {
        "method": "sklearn.pca",
        "backend": "sklearn",
        "seed": 0,
        "seconds": 0.0,
        "forwards": 0,
        "versions": {},
        "options": {},
        "points": points,
        "labels": torch.full((len(points),), -1),
        "indices": torch.arange(len(points)),
        "names": None,
        "classes": None,
        "layer": "fc.in",
    }
    return Embedding(**{**given, **facts})
