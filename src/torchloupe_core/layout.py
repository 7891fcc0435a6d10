"""Activations as canonical maps `[N, C, h, w]`, whatever order a model keeps them in.

A `Layout` says how the output of one layer is to be read:

    nchw      [N, C, h, w]            convolutional maps
    nhwc      [N, h, w, C]            Swin, and inside ConvNeXt blocks
    tokens    [N, prefix + h*w, C]    ViT, DeiT, DINOv2: class and register tokens, then the patch grid, row by row
    vector    [N, C]                  pooled features and logits, read as `[N, C, 1, 1]`

`infer` works one out from what is certain (the module's type, what the source states) and checks it by shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

__all__ = ["Grid", "Layout", "infer", "plausible_grid", "to_map"]

Grid = tuple[int, int]
Order = Literal["nchw", "nhwc", "tokens", "vector"]


@dataclass(frozen=True)
class Layout:
    """How one layer's output is read. `grid` is (h, w); `prefix` counts the tokens before the patch grid."""

    order: Order
    channels: int
    grid: Grid = (1, 1)
    prefix: int = 0

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
    return patches.transpose(1, 2).reshape(len(patches), -1, *layout.grid)


def infer(
    output: Tensor,
    module: nn.Module,
    *,
    image: Grid,
    batch: int,
    grids: Sequence[Grid],
    prefix: int | None = None,
    inherited: Layout | None = None,
    inside_attention: bool = False,
) -> Layout | None:
    """The layout of `output`, the result of `module` on `batch` images of size `image`; None if it is no map.

    grids: the (h, w) of the maps seen earlier in the forward pass, latest last. prefix: what the source states about
    leading tokens. inherited: the layout of a tensor of the same shape that this one was made from.
    """
    if output.ndim == 0 or output.shape[0] != batch or not output.is_floating_point():
        return None  # windows folded into the batch, position tables, masks
    shape = tuple(output.shape)
    if output.ndim == 2:
        return Layout("vector", shape[1])
    if output.ndim == 3:
        return _tokens(shape, image, grids, prefix)
    if output.ndim == 4:
        return _map(shape, module, image, grids, inherited, inside_attention)
    return None


def plausible_grid(grid: Grid, image: Grid, slack: float = 1.34) -> bool:
    """Whether an image can have been reduced to this grid by about the same stride in height and width."""
    if 1 in grid or grid[0] > image[0] or grid[1] > image[1]:
        return grid == (1, 1)
    strides = [size / cells for size, cells in zip(image, grid, strict=True)]
    return max(strides) <= slack * min(strides)


def _map(
    shape: tuple[int, ...],
    module: nn.Module,
    image: Grid,
    grids: Sequence[Grid],
    inherited: Layout | None,
    inside_attention: bool,
) -> Layout | None:
    _, a, b, c = shape
    order = _order_by_type(module, shape)
    if order is None and inherited is not None and inherited.order in ("nchw", "nhwc"):
        order = inherited.order
    if order is None:
        if inside_attention:
            return None  # [N, heads, L, d] and [N, heads, L, L] look like maps and are none
        order = (
            "nhwc"
            if a == b and b != c and plausible_grid((a, b), image) and not plausible_grid((b, c), image)
            else "nchw"
        )
    elif order == "nhwc" and inside_attention and (a, b) not in grids:
        return None  # queries, keys or weights, [N, heads, L, d] or [N, L, L, heads]
    elif order == "nhwc" and not plausible_grid((a, b), image, slack=3):
        return None  # tokens in blocks, [N, blocks, L, C], as in NesT
    return Layout("nchw", a, (b, c)) if order == "nchw" else Layout("nhwc", c, (a, b))


def _order_by_type(module: nn.Module, shape: tuple[int, ...]) -> Order | None:
    convolutional = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
    pooling = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle)
    if isinstance(module, (*convolutional, *pooling)):
        return "nchw"
    if isinstance(module, nn.Linear):
        return "nhwc"
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return "nhwc" if getattr(module, "normalized_shape", None) == shape[-1:] else None
    dims = getattr(module, "dims", None)  # torchvision.ops.Permute
    if dims is not None and type(module).__name__ == "Permute":
        return {(0, 2, 3, 1): "nhwc", (0, 3, 1, 2): "nchw"}.get(tuple(dims))  # type: ignore[return-value]
    return None


def _tokens(shape: tuple[int, ...], image: Grid, grids: Sequence[Grid], prefix: int | None) -> Layout | None:
    """Tokens [N, L, C]: the latest map whose positions, with a few tokens before them, make up L.

    Without such a map, the grid of the image's own shape that fits exactly.
    """
    length, channels = shape[1], shape[2]
    stated = (prefix, 0) if prefix is not None else tuple(range(17))  # pooled stages may drop the prefix
    for grid in reversed(grids):
        before = length - grid[0] * grid[1]
        if before in stated:
            return Layout("tokens", channels, grid, before)
    for before in (prefix, 0) if prefix else (0,):
        height = round(((length - before) * image[0] / image[1]) ** 0.5) if length > before else 0
        width = (length - before) // height if height else 0
        if height * width == length - before and height * width >= 4 and plausible_grid((height, width), image):
            return Layout("tokens", channels, (height, width), before)
    return None
