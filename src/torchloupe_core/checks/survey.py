"""One forward pass, and what each layer gave in it: the material of several checks of a source."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchloupe_core.handle import Handle, Shape
from torchloupe_core.layout import to_map
from torchloupe_core.trace import Layer
from torchloupe_core.watch import first_tensor, hooked

__all__ = ["Corner", "Sight", "Survey", "misplaced", "survey"]

Corner = tuple[int, int]  # (lower, right)

CORNERS: tuple[Corner, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))
# A corner's share of all change from which on its place is judged; it is 1/4 where all positions are mixed. With few
# positions or channels chance alone gives it more.
TELLING, TELLING_OF_FEW = 0.4, 0.8
FEW_ROWS, FEW_CHANNELS = 4, 16
RIGHTLY = 1 / 3  # of what a corner moves most, what it moves at home: no less, unless places are exchanged
ROUNDING = 1e-5  # of a position's values: changes below it are none


@dataclass(frozen=True)
class Sight:
    """What one call of a layer gave: the shape of its map, whether it differs between the five images, and the corner
    of the image that it shows elsewhere."""

    layer: Layer
    shape: tuple[int, ...] | None
    problem: str = ""
    moved: bool = False
    misplaced: Corner | None = None


@dataclass
class Survey:
    """The layers in the order in which they finished for the last time, and every sight of those with positions."""

    images: int
    order: dict[str, None] = field(default_factory=dict)
    sights: list[Sight] = field(default_factory=list)


def survey(handle: Handle, image: Tensor) -> Survey:
    """Runs an image `[1, C, H, W]` and four variants of it, each changed in one quarter, through the model."""
    inputs = _changed_corners(image)
    stated, found = handle.trace(_shape(image)), Survey(len(inputs))
    counts: dict[str, int] = {}

    def leave(name: str, module: nn.Module, output: object) -> None:
        found.order.pop(name, None)
        found.order[name] = None
        counts[name] = counts.get(name, 0) + 1
        layer = stated.calls.get(f"{name}#{counts[name]}")
        if layer is not None and layer.spatial:
            found.sights.append(_seen(layer, first_tensor(output)))

    parts = {name: part for name, part in handle.module.named_modules() if name}
    with handle.borrow(), hooked(parts, None, leave):
        handle.module(inputs)
    return found


def misplaced(maps: Tensor) -> Corner | None:
    """The first corner of the image whose change moves maps `[5, C, h, w]` elsewhere than in that corner.

    At each position the four changes are compared, so that a layer which mixes all positions says nothing, and one
    whose order is wrong shows a corner somewhere else.
    """
    if min(maps.shape[2:]) < 2:
        return None
    few = min(maps.shape[2:]) < FEW_ROWS or maps.shape[1] < FEW_CHANNELS
    moved = (maps[1:] - maps[:1]).abs().sum(1)  # [4, h, w]
    total, even = moved.sum(0), 1 / len(CORNERS)
    changed = total > ROUNDING * maps.abs().sum((0, 1))
    share = torch.where(changed, moved / total.where(changed, 1), even)
    for here, corner in zip(share, CORNERS, strict=True):
        home = _quarter(here, *corner)
        most = here.flatten().topk(home.numel()).values.mean()
        if most > (TELLING_OF_FEW if few else TELLING) and home.mean() - even < RIGHTLY * (most - even):
            return corner
    return None


def _seen(layer: Layer, tensor: Tensor | None) -> Sight:
    if tensor is None or layer.layout is None:
        return Sight(layer, None, "no tensor")
    try:
        maps = to_map(tensor, layer.layout)
    except (RuntimeError, IndexError) as error:
        return Sight(layer, None, str(error))
    moved = bool((maps[1:] != maps[:1]).any())  # not behind a scale that begins at zero
    return Sight(layer, tuple(maps.shape), moved=moved, misplaced=misplaced(maps))


def _changed_corners(image: Tensor) -> Tensor:
    """An image `[1, C, H, W]`, then the image changed in each of its four quarters, `[5, C, H, W]`."""
    inputs = image.repeat(1 + len(CORNERS), 1, 1, 1)
    for changed, corner in zip(inputs[1:], CORNERS, strict=True):
        _quarter(changed, *corner).add_(1)
    return inputs


def _quarter(picture: Tensor, lower: int, right: int) -> Tensor:
    """One quarter of `[..., h, w]`, without the middle row and column of odd sizes."""
    height, width = picture.shape[-2] // 2, picture.shape[-1] // 2
    top, left = lower * (picture.shape[-2] - height), right * (picture.shape[-1] - width)
    return picture[..., top : top + height, left : left + width]


def _shape(images: Tensor) -> Shape:
    return images.shape[1], images.shape[2], images.shape[3]
