"""DeepDream: a picture changed at one size after the other, from coarse to fine, tile by tile where it is large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.atoms import Unit
from torchloupe_core.descent import steepest
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.images import Pixels
from torchloupe_core.making import commissioned, made_of
from torchloupe_core.methods.optimize import native
from torchloupe_core.pixels import Near
from torchloupe_core.registry import method
from torchloupe_core.targets import Target
from torchloupe_core.task import Made
from torchloupe_core.transforms import Roll

__all__ = ["Dream", "octave_sizes", "octaves"]

Size = tuple[int, int]


@dataclass(frozen=True)
class Dream:
    """Pictures `[n, C, H, W]` in [0, 1] to dream on, and a target for each.

    sizes: of the octaves, the smallest first. steps: of each. tile: the most that the network is shown at once, a
    side. jitter: by how many pixels the image is moved before a step, at most. options: of the task.
    """

    handle: Handle
    images: Tensor
    targets: Sequence[Target]
    sizes: Sequence[Size]
    steps: int
    lr: float
    jitter: int
    tile: Size
    seed: int
    options: dict[str, Any]
    report: Callable[..., None] = lambda done, total, note="": None


def octave_sizes(size: Size, octaves: int, scale: float, least: Size = (1, 1)) -> list[Size]:
    """(H, W) of the octaves, the smallest first, each `scale` times the one before; none below `least`."""
    if octaves < 1 or not 1 < scale < float("inf"):
        raise BadInput(f"octaves is at least 1 and each above 1 times as large; got {octaves} and {scale}")
    found = [(max(1, round(size[0] / scale**one)), max(1, round(size[1] / scale**one))) for one in range(octaves)]
    return [one for one in reversed(found) if one[0] >= least[0] and one[1] >= least[1]]


@method(
    "dream",
    "deepdream",
    needs=("gradient",),
    cost="octaves (4) x steps (12) x (forward + backward)",
    paper="Mordvintsev, Olah and Tyka 2015, Inceptionism: Going Deeper into Neural Networks",
    random=True,
)
def octaves(dream: Dream) -> Made:
    """At each size the picture plus what was added at smaller ones, moved along the gradient."""
    detail: Tensor | None = None
    parts: list[Made] = []
    for number, size in enumerate(dream.sizes):
        base = _resized(dream.images, size)
        start = base if detail is None else (base + _resized(detail, size)).clamp(0, 1)
        try:
            parts.append(_octave(dream, start, number))
        except KeyboardInterrupt:  # in the first step of an octave
            if not (parts and dream.options.get("interruptible")):
                raise
            parts[-1] = replace(parts[-1], stopped=f"interrupted after octave {number}", interrupted=True)
            break
        detail = parts[-1].images.to(base) - base
        if parts[-1].stopped:
            break
    return _joined(dream, parts, detail)


def _octave(dream: Dream, start: Tensor, number: int) -> Made:
    size = (start.shape[2], start.shape[3])
    tile = (min(dream.tile[0], size[0]), min(dream.tile[1], size[1]))
    whole = tile == size
    if not whole:
        _require_no_places(dream.targets)
    done, total = number * dream.steps, len(dream.sizes) * dream.steps

    def report(step: int, steps: int, note: str) -> None:
        dream.report(done + round(dream.steps * step / steps), total, f"octave {number + 1}, {note}")

    task = commissioned(
        dream.handle,
        dream.targets,
        init=Pixels(start),
        parametrization=Near(),
        # Far enough for every seam between tiles to lie elsewhere each time.
        transforms=[Roll(dream.jitter if whole else max(dream.jitter, max(tile) // 2))],
        steps=dream.steps,
        lr=dream.lr,
        optimizer=steepest("mean"),
        tile=None if whole else tile,
        seed=dream.seed + number,
        report=report,
        **dream.options,
    )
    return made_of(task, native, None if whole else 1)


def _joined(dream: Dream, parts: Sequence[Made], detail: Tensor | None) -> Made:
    """The picture with what was added until now, all of it at full size, and the losses of all octaves."""
    last, n = parts[-1], min(len(part.images) for part in parts)
    images = last.images
    size = (dream.images.shape[2], dream.images.shape[3])
    if detail is not None and tuple(images.shape[2:]) != size:
        images = (dream.images[: len(detail)] + _resized(detail, size)).clamp(0, 1).float().cpu()
    losses = torch.cat([part.losses[:n] for part in parts], 1)
    return replace(last, images=images[:n], scores=last.scores[:n], losses=losses, redirected=())


def _require_no_places(targets: Sequence[Target]) -> None:
    for one in targets:
        if any(isinstance(atom, Unit) and atom.position is not None for _, atom in one.terms):
            raise BadInput(
                f"{one} names a place, but the picture is shown in tiles; give a whole channel, or a larger tile="
            )


def _resized(images: Tensor, size: Size) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    smaller = size[0] < images.shape[2]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=smaller)
