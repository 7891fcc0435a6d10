"""Choosing channels of a layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torchloupe_core.errors import BadInput

__all__ = ["select"]


def select(channels: Sequence[int] | int | None, count: int, layer: str) -> list[int]:
    """The channels asked for, all of them for None. Raises `BadInput` for one that the layer does not have."""
    if channels is None:
        return list(range(count))
    try:
        chosen = [operator.index(one) for one in (channels if hasattr(channels, "__iter__") else [channels])]
    except TypeError:
        raise BadInput(f"channels are whole numbers, as in channels=[3, 17]; got {channels!r}") from None
    if wrong := [one for one in chosen if not 0 <= one < count]:
        raise BadInput(f"layer {layer!r} has channels 0 to {count - 1}; got {wrong[0]}")
    if not chosen:
        raise BadInput("no channels were given; leave channels= out for all of them")
    return chosen
