"""Receptive fields: what part of the image each position of each channel of a layer reads.

One pass over the model finds them for all its layers (`reach`). Where an operation is not understood they are measured
instead, as the support of the gradient, and say so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchloupe_core import trace as tracing
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.layout import Grid, Layout, to_map
from torchloupe_core.reach import SEEN, THEORY, Reach, Reading, image_reach, known, squeezed, tag
from torchloupe_core.reach_rules import rule_of
from torchloupe_core.trace import Trace
from torchloupe_core.watch import Place, first_tensor, hooked

__all__ = ["Box", "Clipped", "Fields", "ReceptiveField", "fields"]

Box = tuple[int, int, int, int]
Extent = int | tuple[int, int]
Shape = tuple[int, int, int]

DRAWS = 3  # of noise, for a measurement: a ReLU or a maximum hides other pixels each time


class Clipped(NamedTuple):
    """The part of a box that is read of the image, and the pixels cut off at each of its four sides."""

    box: Box
    cut: Box


@dataclass(frozen=True)
class ReceptiveField:
    """What one position of a layer reads of the image, for one channel or, around all channels, for the layer.

    size, stride, padding: in pixels, pairs (down, across) where they differ; position i reads `[i * stride - padding,
    i * stride - padding + size)` (Araujo, Norris and Sim 2019). Where `regular` is False no three numbers say it all:
    they are the largest size, the mean stride and the padding of the first position, and the boxes are right. A layer
    that reads the whole image everywhere has the image's size, stride 0 and padding 0.

    layer, channel, image (H, W), grid (h, w): what it is the field of. without_gates: whether whatever reads the whole
    map at once was left out. measured: why it had to be measured; then boxes end at the image's border.
    """

    size: Extent
    stride: Extent
    padding: Extent
    layer: str
    channel: int | None
    image: Grid
    grid: Grid
    regular: bool
    without_gates: bool
    measured: str | None
    _boxes: Tensor = field(repr=False, compare=False)  # [h, w, 4]
    _seen: Tensor = field(repr=False, compare=False)  # [h, w, 4]

    def box(self, row: int, col: int) -> Box:
        """`(top, left, bottom, right)` in input pixels, bottom and right exclusive; it may reach beyond the image."""
        return self._at(self._boxes, row, col)

    def clipped(self, row: int, col: int) -> Clipped:
        """The box as far as it is read of this image: without padding, and what depends on padding alone."""
        box, seen = self.box(row, col), self._at(self._seen, row, col)
        return Clipped(seen, tuple(abs(a - b) for a, b in zip(box, seen, strict=True)))  # type: ignore[arg-type]

    def _at(self, boxes: Tensor, row: int, col: int) -> Box:
        height, width = self.grid
        if not (0 <= row < height and 0 <= col < width):
            raise BadInput(f"no position {row},{col} in the {height}x{width} map of {self.layer!r}")
        top, left, bottom, right = boxes[row, col].tolist()
        return top, left, bottom, right


@dataclass(frozen=True)
class Fields:
    """The receptive fields of every position of every channel of a layer.

    `boxes` looks many up at once, `of` makes one of them a `ReceptiveField`. distinct: whether channels differ.
    """

    layer: str
    channels: int
    grid: Grid
    image: Grid
    reach: Reach  # of [C, h, w]
    without_gates: bool = False
    measured: str | None = None

    @property
    def distinct(self) -> bool:
        """Whether channels have different fields."""
        return any(squeezed(bound).shape[0] > 1 for bound in self.reach.bounds)

    def boxes(self, channels: Tensor, rows: Tensor, cols: Tensor, *, clipped: bool = False) -> Tensor:
        """`[n, 4]` boxes `(top, left, bottom, right)` of n positions, given as index tensors `[n]`."""
        bounds = self.reach.bounds[SEEN if clipped else THEORY]
        return self._pixels([bound[channels, rows, cols] for bound in bounds])

    def of(self, channel: int | None = None) -> ReceptiveField:
        """The field of one channel, or around those of all."""
        if channel is not None and not 0 <= channel < self.channels:
            raise BadInput(f"layer {self.layer!r} has {self.channels} channels; there is no channel {channel}")

        def pick(bound: Tensor) -> Tensor:
            return squeezed(bound).amin(0).expand(self.grid) if channel is None else bound[channel]

        bounds = [pick(bound) for bound in self.reach.bounds]
        boxes, seen = self._pixels(bounds[THEORY]), self._pixels(bounds[SEEN])
        whole = bool((bounds[0] == -math.inf).all()) or (_still(boxes) and bool((seen == self._image).all()))
        if whole:
            boxes = self._image.expand_as(boxes)
        down, across = (_numbers(boxes, axis, self.reach.step[axis], whole=whole) for axis in (0, 1))
        size, stride, padding = (a if a == b else (a, b) for a, b in zip(down[:3], across[:3], strict=True))
        return ReceptiveField(
            size,
            stride,
            padding,
            layer=self.layer,
            channel=channel,
            image=self.image,
            grid=self.grid,
            regular=down[3] and across[3],
            without_gates=self.without_gates,
            measured=self.measured,
            _boxes=boxes,
            _seen=seen,
        )

    @property
    def _image(self) -> Tensor:
        return torch.tensor([0, 0, *self.image])

    def _pixels(self, bounds: Sequence[Tensor]) -> Tensor:
        """Bounds as boxes `[..., 4]`; where nothing but gates is read, the whole image, where nothing at all, empty."""
        top, left, bottom, right = bounds
        boxes = torch.stack([top.floor(), left.floor(), 1 - bottom.floor(), 1 - right.floor()], -1)
        empty = self._image if self.without_gates else torch.zeros(4)
        boxes = torch.where((top == math.inf)[..., None], empty.to(boxes), boxes)
        return torch.where(boxes.isfinite(), boxes, self._image.to(boxes)).long()


def _still(boxes: Tensor) -> bool:
    """Whether all positions of a map, of which there are several, have one box."""
    return boxes.flatten(0, 1).shape[0] > 1 and bool((boxes == boxes[:1, :1]).all())


def _numbers(boxes: Tensor, axis: int, step: float, *, whole: bool) -> tuple[int, int, int, bool]:
    """Size, stride and padding along one axis, and whether they tell every box."""
    first, last = boxes[..., axis], boxes[..., axis + 2]  # [h, w]
    size, positions = int((last - first).max()), boxes.shape[axis]
    start = first.select(axis, 0).min()
    if whole:
        stride = 0
    elif positions == 1:
        stride = round(step)
    else:
        stride = round(float((first.select(axis, -1).min() - start) / (positions - 1)))
    steps = torch.arange(positions).view((-1, 1) if axis == 0 else (1, -1)) * stride
    regular = bool((first == start + steps).all()) and bool((last - first == size).all())
    return size, stride, -int(start), regular


# -- finding them -----------------------------------------------------------------------------------------------------


def fields(handle: Handle, layer: object, *, shape: Shape | None = None, without_gates: bool = False) -> Fields:
    """The receptive fields of a layer, for inputs of a shape (C, H, W), the model's own unless given.

    without_gates: leave out what reads the whole map at once, as squeeze-excite, attention over all tokens and the
    statistics of group normalisation do. A layer that reads nothing otherwise still has the whole image.
    """
    shape = shape or handle.input_shape
    found = handle.kept(("reaches", without_gates), shape, lambda: _run(handle, shape, gates=not without_gates))
    name = str(layer)
    stated = found.trace.layer(name, dict(handle.module.named_modules()))
    place = Place.parse(name)
    reach = found.reaches.get(f"{place.module}#{place.call or stated.calls}" + (".in" if place.entering else ""))
    if stated.layout is None:
        raise NotApplicable(f"layer {name!r} gives no map of channels, so its positions have no place in the image")
    if reach is None:
        raise NotApplicable(f"layer {name!r} does not depend on the image by operations of torch")
    if not reach.doubts:
        return _fields(name, stated.layout, shape, _mapped(reach, stated.layout), without_gates=without_gates)
    unclear = ", ".join(sorted(reach.doubts))
    if without_gates:
        raise NotApplicable(
            f"what {name!r} reads is not known through {unclear}; it can be measured with its gates only"
        )
    measured = handle.kept(("reach measured", name), shape, lambda: _measured(handle, name, shape))
    return _fields(name, stated.layout, shape, measured, measured=f"what {unclear} reads is not known")


def _fields(name: str, layout: Layout, shape: Shape, reach: Reach, **facts: Any) -> Fields:
    return Fields(name, layout.channels, layout.grid, (shape[1], shape[2]), reach, **facts)


def _mapped(reach: Reach, layout: Layout) -> Reach:
    """What a raw output reads, as a map `[C, h, w]` of the first image of the batch."""
    return reach.changed(lambda bound: to_map(bound, layout)[0]).compact()


@dataclass
class _Found:
    """What one pass found: the modules that ran, and what every output and input of theirs reads."""

    trace: Trace
    reaches: dict[str, Reach]


def _run(handle: Handle, shape: Shape, *, gates: bool) -> _Found:
    """Without numbers, which is quick; with noise where the model's course depends on numbers."""
    with handle.borrow():
        if _quick():
            try:
                return _read(handle, shape, gates=gates, values=False)
            except Exception:  # whatever a model may raise that looks at numbers or at its device
                pass
        try:
            return _read(handle, shape, gates=gates, values=True)
        except Exception as error:
            error.add_note(f"torchloupe was running the model on an input of shape {list(shape)}")
            raise


def _quick() -> bool:
    """Whether tensors without numbers cost nothing: for the first ones torch loads its whole compiler, for seconds."""
    return "torch._dynamo" in sys.modules


def _read(handle: Handle, shape: Shape, *, gates: bool, values: bool) -> _Found:
    recorder = _Recorder()
    full = (tracing.BATCH, *shape)
    inputs = torch.empty(full, dtype=handle.dtype, device="meta")
    if values:
        inputs = torch.randn(full, generator=torch.Generator().manual_seed(0)).to(handle.device, handle.dtype)
    tag(inputs, image_reach(full))
    parts = {name: part for name, part in handle.module.named_modules() if name}
    with hooked(parts, recorder.enter, recorder.leave), Reading(rule_of, handle.device, gates=gates, values=values):
        trace = tracing.run(handle.module, handle.spec, inputs)
    return _Found(trace, recorder.reaches)


class _Recorder:
    """The two hooks of the pass."""

    def __init__(self) -> None:
        self.reaches: dict[str, Reach] = {}
        self._begun: dict[str, list[Reach | None]] = {}
        self._calls: dict[str, int] = {}

    def enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        self._begun.setdefault(name, []).append(known(first_tensor(arguments)))

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        call = self._calls[name] = self._calls.get(name, 0) + 1
        self._keep(f"{name}#{call}.in", self._begun[name].pop())
        self._keep(f"{name}#{call}", known(first_tensor(output)))

    def _keep(self, name: str, reach: Reach | None) -> None:
        if reach is not None:
            self.reaches[name] = reach


def _measured(handle: Handle, name: str, shape: Shape) -> Reach:
    """The support of the gradient of single positions, along the map's diagonal, on noise: at least this is read."""
    generator = torch.Generator().manual_seed(0)
    with handle.watch(name, shape=shape) as watch, torch.enable_grad():
        supports = []
        for _ in range(DRAWS):
            image = torch.randn((1, *shape), generator=generator).to(handle.device, handle.dtype).requires_grad_(True)
            watch(image)
            supports.append(_supports(watch.map(name)[0], image))
    rows, columns = (torch.stack(same).any(0) for same in zip(*supports, strict=True))  # [h, H], [w, W]
    top, bottom = _ends(rows)
    left, right = _ends(columns)
    bounds = (top[None, :, None], left[None, None], bottom[None, :, None], right[None, None])
    extent = watch.map(name).shape[1:]
    return Reach(tuple(bound.expand(extent) for bound in bounds) * 2, (shape[1] / extent[1], shape[2] / extent[2]))


def _supports(features: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of the image each row of the map `[C, h, w]` reads, and which columns each column."""
    _, height, width = features.shape
    rows = torch.zeros(height, image.shape[-2], dtype=torch.bool)
    columns = torch.zeros(width, image.shape[-1], dtype=torch.bool)
    for step in range(max(height, width)):
        row, column = (step * size // max(height, width) for size in (height, width))
        (gradient,) = torch.autograd.grad(features[:, row, column].sum(), image, retain_graph=True)
        read = (gradient[0] != 0).any(0).cpu()
        rows[row] |= read.any(1)
        columns[column] |= read.any(0)
    return rows, columns


def _ends(read: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the negated last place read, for each position `[n, size]`."""
    places = torch.arange(read.shape[1], dtype=torch.float32).expand(read.shape)
    ends: Callable[[Tensor], Tensor] = lambda one: one.masked_fill(~read, math.inf).amin(1)  # noqa: E731
    return ends(places), ends(-places)
