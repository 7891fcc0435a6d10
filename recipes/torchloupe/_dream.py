"""A photograph with more of what a model sees in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe._visualize import visualization
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.images import read_pixels
from torchloupe_core.making import asked
from torchloupe_core.methods.dream import Dream, octave_sizes
from torchloupe_core.regularizers import RegularizersLike
from torchloupe_core.targets import TargetLike
from torchloupe_core.visualization import Visualization

__all__ = ["dream"]


def dream(
    model: ModelLike,
    image: Any,
    target: TargetLike | Sequence[TargetLike],
    *,
    octaves: int = 4,
    octave_scale: float = 1.4,
    steps: int = 12,
    lr: float = 0.006,
    jitter: int = 16,
    tile: int | None = 512,
    size: int | None = None,
    regularizers: RegularizersLike = None,
    read: str = "auto",
    seed: int = 0,
    precision: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    interruptible: bool = False,
    progress: bool | None = None,
) -> Visualization:
    """A photograph changed so that a target rises, from coarse to fine (DeepDream, Mordvintsev et al. 2015).

    image: a picture of any size, which is not preprocessed but shown as it is; a float tensor is a model input. target:
    often a layer, as "layer3", for more of whatever it sees; one for all images, or one for each. size: pixels of the
    longer side to scale the picture to. octaves: sizes it is changed at, each `octave_scale` times the one before and
    the last its own; steps: at each, `lr` (of the range of a pixel) long on average. jitter: pixels by which the image
    is moved before each step.

    tile: pixels of a side that the network is shown at once; a larger picture goes through it in tiles whose seams are
    elsewhere at each step, in the memory of one tile, and a target is then that of each tile. None shows it whole. A
    model of one input size is always shown tiles of that size. Raises `BadInput` for a picture that is too small.
    """
    begun = time.perf_counter()
    handle = opened(model, device=device, dtype=dtype, memory_format=memory_format)
    working = torch.promote_types(handle.dtype, torch.float32)
    pixels = read_pixels(image, handle.spec, device=handle.device, dtype=working, longest=size).values
    wanted = asked(target, 1)
    wanted = wanted * len(pixels) if len(wanted) == 1 else wanted
    pixels = pixels.expand(len(wanted), -1, -1, -1) if len(pixels) == 1 else pixels
    if len(wanted) != len(pixels):
        raise BadInput(f"{len(wanted)} targets for {len(pixels)} images; give one for all or one for each")
    whole = (pixels.shape[2], pixels.shape[3])
    shown, least = _tile(handle, whole, tile)
    sizes = octave_sizes(whole, octaves, octave_scale, least)
    options: dict[str, Any] = {
        "regularizers": regularizers,
        "read": read,
        "precision": precision,
        "memory_format": memory_format,
    }
    options |= {"interruptible": interruptible}
    forwards, way = handle.forwards, registry.find("dream", "deepdream")
    with handle.borrow(), progress_bar("dream", "steps", progress) as report:
        made = way.run(Dream(handle, pixels, wanted, sizes, steps, lr, jitter, shown, seed, options, report))
    facts = {"steps": steps, "lr": lr, "octaves": [list(one) for one in sizes], "jitter": jitter, "tile": list(shown)}
    return visualization(
        made,
        wanted,
        way,
        given=pixels,
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        options={**facts, "regularizers": str(regularizers), "read": read},
        diagnostics={},
    )


def _tile(handle: Handle, size: tuple[int, int], tile: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """(h, w) of what the network is shown at most, and at least."""
    if tile is not None and tile < 1:
        raise BadInput(f"tile is at least 1 pixel; got {tile}")
    if handle.spec.fixed_size and handle.spec.input_size is not None:
        own = handle.spec.input_size[1:]
        if size[0] < own[0] or size[1] < own[1]:
            raise BadInput(
                f"the model sees {own[0]}x{own[1]} only and the picture is {size[0]}x{size[1]}; scale it up with size="
            )
        return own, own
    return (size if tile is None else (tile, tile)), (1, 1)
