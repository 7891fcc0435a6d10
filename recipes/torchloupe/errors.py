"""Every error torchloupe raises on purpose; all are `LoupeError`."""

from __future__ import annotations

from torchloupe_core.errors import (
    BadInput,
    BadTarget,
    LoupeError,
    MissingDependency,
    NotApplicable,
    StoreError,
    UnknownName,
)

__all__ = [
    "BadInput",
    "BadTarget",
    "LoupeError",
    "MissingDependency",
    "NotApplicable",
    "StoreError",
    "UnknownName",
]
