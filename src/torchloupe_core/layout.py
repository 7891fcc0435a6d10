"""Activations as canonical maps `[N, C, h, w]`, whatever order a model keeps them in.

A `Layout` says how the output of one layer is to be read:

    nchw      [N, C, h, w]            convolutional maps
    nhwc      [N, h, w, C]            Swin, and inside ConvNeXt blocks
    tokens    [N, prefix + h*w, C]    ViT, DeiT, DINOv2: class and register tokens, then the patch grid, row by row
    vector    [N, C]                  pooled features and logits, read as `[N, C, 1, 1]`

Hiera's tokens are `unrolled`: in the order of its pooling, not row by row.

`infer` works one out from what is certain (the module's type, what the source states) and checks it by shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Grid", "Layout", "from_map", "infer", "plausible_grid", "to_map"]

Grid = tuple[int, int]
Order = Literal["nchw", "nhwc", "tokens", "vector"]

MOST_PREFIX = 16  # class, distillation and register tokens


@dataclass(frozen=True)
class Layout:
    """How one layer's output is read. `grid` is (h, w); `prefix` counts the tokens before the patch grid.

    unrolled: strides (rows, columns) that were moved, one after the other, before the rest of the positions: with
    (2, 2) the first quarter of the tokens are those of even rows and columns.
    """

    order: Order
    channels: int
    grid: Grid = (1, 1)
    prefix: int = 0
    unrolled: tuple[Grid, ...] = ()

    @property
    def spatial(self) -> bool:
        """Whether there is more than one position to look at."""
        return self.grid[0] * self.grid[1] > 1

    @property
    def channel_dim(self) -> int:
        """The dimension of the raw output that holds channels."""
        return 1 if self.order in ("nchw", "vector") else -1


def to_map(activation: Tensor, layout: Layout) -> Tensor:
    """The activation as `[N, C, h, w]`: a view where the memory order allows, differentiable in any case."""
    if layout.order == "nchw":
        return activation
    if layout.order == "nhwc":
        return activation.permute(0, 3, 1, 2)
    if layout.order == "vector":
        return activation[:, :, None, None]
    patches = activation[:, layout.prefix :]  # [N, h*w, C]
    if layout.unrolled:
        patches = _rolled(patches, layout)
    return patches.transpose(1, 2).reshape(len(patches), -1, *layout.grid)


def from_map(maps: Tensor, layout: Layout, activation: Tensor) -> Tensor:
    """Maps `[N, C, h, w]` in the order of a layer's raw output, the inverse of `to_map`; differentiable.

    activation: the raw output the maps were read from; its tokens before the grid are kept.
    """
    if layout.order == "nchw":
        return maps
    if layout.order == "nhwc":
        return maps.permute(0, 2, 3, 1)
    if layout.order == "vector":
        return maps[:, :, 0, 0]
    patches = maps.flatten(2).transpose(1, 2)  # [N, h*w, C]
    if layout.unrolled:
        tokens = torch.arange(patches.shape[1], device=maps.device)
        row_by_row = _rolled(tokens[None, :, None], layout)[0, :, 0]  # the token at each position
        patches = patches[:, row_by_row.argsort()]
    return torch.cat([activation[:, : layout.prefix], patches], 1)


def _rolled(patches: Tensor, layout: Layout) -> Tensor:
    """Unrolled tokens `[N, h*w, C]`, row by row."""
    strides = [stride for pair in layout.unrolled for stride in pair]
    rest = [size // math.prod(strides[axis::2]) for axis, size in enumerate(layout.grid)]
    depth = len(layout.unrolled)
    rows = [2 * depth + 1, *range(2 * depth - 1, 0, -2)]  # the rest, then the strides, innermost last
    patches = patches.reshape(len(patches), *strides, *rest, -1)
    return patches.permute(0, *rows, *(row + 1 for row in rows), patches.ndim - 1).flatten(1, -2)


def infer(
    output: Tensor,
    module: nn.Module,
    *,
    image: Grid,
    batch: int,
    grids: Sequence[Grid],
    prefix: int | None = None,
    prefixes: Sequence[int] = range(MOST_PREFIX + 1),
    inherited: Layout | None = None,
    fed: Layout | None = None,
    attention: bool = False,
    inside_attention: bool = False,
) -> Layout | None:
    """The layout of `output`, the result of `module` on `batch` images of size `image`; None if it is no map.

    grids: the (h, w) of the maps seen earlier in the forward pass, latest last. prefix: what the source states about
    leading tokens; prefixes: how many there may be where it states nothing. inherited: the layout of a tensor of the
    same shape that this one was made from; fed: that of what the module was given. attention: it is an attention
    module or inside one; then maps lie on one of the grids, since windows and pooled keys may look like maps.
    """
    if output.ndim == 0 or output.shape[0] != batch or not output.is_floating_point():
        return None  # windows folded into the batch, position tables, masks
    shape = tuple(output.shape)
    if output.ndim == 2:
        return Layout("vector", shape[1])
    if output.ndim == 3:
        if isinstance(module, (nn.Conv1d, nn.BatchNorm1d)):
            return None  # [N, C, L]
        if fed is not None and fed.order == "tokens" and fed.grid[0] * fed.grid[1] + fed.prefix == shape[1]:
            return replace(fed, channels=shape[2])
        stated = prefixes if prefix is None else (prefix, 0)
        return _tokens(shape, grids, stated) or (None if attention else _guess(shape, image, grids, prefix))
    if output.ndim == 4:
        order = _order(shape, module, image, grids, inherited, fed, attention, inside_attention)
        if order is not None:
            _, a, b, c = shape
            return Layout("nchw", a, (b, c)) if order == "nchw" else Layout("nhwc", c, (a, b))
    return None


def plausible_grid(grid: Grid, image: Grid, slack: float = 1.34) -> bool:
    """Whether an image can have been reduced to this grid by about the same stride in height and width."""
    if 1 in grid or grid[0] > image[0] or grid[1] > image[1]:
        return grid == (1, 1)
    return _unevenness(grid, image) <= slack


def _unevenness(grid: Grid, image: Grid) -> float:
    """The larger of the strides in height and width, in units of the smaller."""
    strides = [size / cells for size, cells in zip(image, grid, strict=True)]
    return max(strides) / min(strides)


def _order(
    shape: tuple[int, ...],
    module: nn.Module,
    image: Grid,
    grids: Sequence[Grid],
    inherited: Layout | None,
    fed: Layout | None,
    attention: bool,
    inside_attention: bool,
) -> Order | None:
    _, a, b, c = shape
    order = _order_by_type(module, shape)
    if order is None and inherited is not None and inherited.order in ("nchw", "nhwc"):
        order = inherited.order
    if order is None:  # inside attention [N, heads, L, d] and [N, heads, L, L] look like maps and are none
        order = None if inside_attention else _order_by_shape((a, b), (b, c), image, grids)
    grid = (b, c) if order == "nchw" else (a, b)
    if attention and grid not in grids and not (order == "nchw" and _moves_over_maps(module, fed)):
        return None  # queries, keys or weights, [N, heads, L, d] or [N, L, L, heads]
    if order == "nhwc" and not plausible_grid(grid, image, slack=1.7):
        return None  # tokens in blocks, [N, blocks, L, C]
    return order


def _moves_over_maps(module: nn.Module, fed: Layout | None) -> bool:
    """Whether a convolution's input is a map: it is known to be, or the convolution is more than one position wide."""
    return (fed is not None and fed.order == "nchw") or getattr(module, "kernel_size", 1) not in (1, (1, 1))


def _order_by_shape(first: Grid, last: Grid, image: Grid, grids: Sequence[Grid]) -> Order | None:
    """Of [N, C, h, w] and [N, h, w, C] the one whose grid was seen before, or whose strides are more alike."""
    if first == last:
        return None if first != (1, 1) else "nchw"
    orders: list[tuple[Grid, Order]] = [(last, "nchw"), (first, "nhwc")]
    possible = [(grid, order) for grid, order in orders if plausible_grid(grid, image)]
    seen = [one for one in possible if one[0] in grids]
    best = min(seen or possible, key=lambda one: _unevenness(one[0], image), default=None)
    return best[1] if best else None


def _order_by_type(module: nn.Module, shape: tuple[int, ...]) -> Order | None:
    convolutional = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
    pooling = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle)
    if isinstance(module, (*convolutional, *pooling)):
        return "nchw"
    if isinstance(module, nn.Linear):
        return "nhwc"
    normalized = getattr(module, "normalized_shape", None)
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return "nhwc" if normalized == shape[-1:] else None
    if normalized in (shape[-1:], shape[1:2]):  # over channels, wherever they are
        last = normalized == shape[-1:] and (shape[1] != shape[-1] or "2d" not in type(module).__name__)
        return "nhwc" if last else "nchw"
    dims = getattr(module, "dims", None)  # torchvision.ops.Permute
    if dims is not None and type(module).__name__ == "Permute":
        return {(0, 2, 3, 1): "nhwc", (0, 3, 1, 2): "nchw"}.get(tuple(dims))  # type: ignore[return-value]
    return None


def _tokens(shape: tuple[int, ...], grids: Sequence[Grid], prefixes: Sequence[int]) -> Layout | None:
    """Tokens [N, L, C]: the latest map whose positions, with a few tokens before them, make up L."""
    length, channels = shape[1], shape[2]
    for grid in reversed(grids):
        before = length - grid[0] * grid[1]
        if before in prefixes:  # pooled stages may drop the prefix
            return Layout("tokens", channels, grid, before)
    return None


def _guess(shape: tuple[int, ...], image: Grid, grids: Sequence[Grid], prefix: int | None) -> Layout | None:
    """Tokens on a grid of the image's own shape that fits exactly: the first grid, or an earlier one thinned out."""
    length, channels = shape[1], shape[2]
    for before in (prefix, 0) if prefix else (0,):
        height = round(((length - before) * image[0] / image[1]) ** 0.5) if length > before else 0
        width = (length - before) // height if height else 0
        grid = (height, width)
        fits = height * width == length - before and height * width >= 4 and plausible_grid(grid, image)
        if fits and (not grids or any(_thinned(one, grid) for one in grids)):
            return Layout("tokens", channels, grid, before)
    return None


def _thinned(grid: Grid, coarser: Grid) -> bool:
    """Whether every second, third or fourth row and column of a grid make up the coarser one."""
    return any(tuple(-(-size // step) for size in grid) == coarser for step in (1, 2, 3, 4))
