"""Weights of a unit over an earlier layer, through everything linear between them.

Voss et al. 2021, Visualizing Weights (Distill): adjacent layers' weights are multiplied out, nonlinearities ignored.
Here by the gradient of the linearised model, which is exact for any path: convolutions, normalisation in eval mode,
mean pooling, sums of branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchloupe_core.channels import select
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.layout import Layout, to_map
from torchloupe_core.linearise import Linearised
from torchloupe_core.methods.filters import INPUT, Kernels, by_norm

__all__ = ["expanded_kernels"]

LARGEST = 512  # pixels: how far inputs are enlarged so that no kernel is cut off by the map's border
ROUNDING = 1e-10  # of the largest weight, in double precision


def expanded_kernels(
    handle: Handle,
    layer: str,
    to: str,
    channels: Sequence[int] | int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Kernels:
    """`[F, C, h, w]`: what the centre unit of each channel of `layer` gets from each channel and offset of `to`.

    to: an earlier layer, or "input". Raises `NotApplicable` if no fixed weights join the two even without rectifiers:
    a gate, an attention or a normalisation by what is seen lies between. The model is one in double precision, so that
    rounding is told from a weight.
    """
    if layer == to:
        raise BadInput(f'to={to!r} is the layer itself; name one before it, or "input"')
    with handle.borrow():
        chosen = select(channels, _layout(handle, layer).channels, layer)
        reach = _reach(handle, layer, to)
        path = _path(handle, layer, to, reach.shape, images=1)
        top, left, bottom, right = reach.box
        images = []
        for done, channel in enumerate(chosen, 1):
            only = torch.zeros_like(path.units[0]).index_fill(0, torch.tensor(channel, device=handle.device), 1)
            images.append(path.gradient(only)[0, :, top:bottom, left:right].float().cpu())
            progress(done, len(chosen))
    weight = torch.stack(images)
    inputs = torch.arange(weight.shape[1]).expand(len(weight), -1)
    if not path.colour:
        weight, inputs = by_norm(weight, inputs)
    facts = {
        "position": path.position,
        "box": reach.box,
        "clipped": reach.clipped,
        "input_size": reach.shape,
        "ignored": path.ignored,
    }
    return Kernels(weight.contiguous(), inputs.contiguous(), layer, chosen, path.colour, facts)


@dataclass
class _Path:
    """One linearised pass: `units [N, C]`, the centre of a layer's map, and the activation they are to be expanded to.

    position: of the centre, (row, column). ignored: the nonlinearities on the way, and how often each.
    """

    units: Tensor
    position: tuple[int, int]
    spatial: bool
    source: Tensor
    layout: Layout
    colour: bool
    ignored: Mapping[str, int]
    suspects: Sequence[str]

    def gradient(self, mix: Tensor) -> Tensor:
        """Of the units' sum, weighed by `mix [C]`, by the earlier activation, as maps `[N, C, h, w]`."""
        with torch.enable_grad():
            total = (self.units * mix).sum()  # grad_outputs= would load sympy, which takes seconds
        (found,) = torch.autograd.grad(total, self.source, retain_graph=True)
        return to_map(found, self.layout)


@dataclass(frozen=True)
class _Reach:
    """Which part of the earlier map the units read, `(top, left, bottom, right)`, in inputs of a shape (C, H, W)."""

    shape: Shape
    box: tuple[int, int, int, int]
    clipped: bool


def _path(handle: Handle, layer: str, to: str, shape: Shape, images: int) -> _Path:
    """One pass of noise, and from noise at `to`: of several images, the second has the first one's values negated."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=generator).to(like)
        if images > 1:
            values[1] = -values[0]
        return values.requires_grad_(True)

    from_input = to == INPUT and INPUT not in dict(handle.module.named_modules())
    first = Layout("nchw", shape[0], shape[1:]) if from_input else _layout(handle, to, shape)
    begin, exchange = (None, None) if from_input else (to, {to: noise})
    with (
        handle.watch(layer, leaf=begin, exchange=exchange, shape=shape) as watch,
        torch.enable_grad(),
        Linearised() as linear,
    ):
        inputs = noise(torch.empty((images, *shape), device=handle.device, dtype=handle.dtype))
        watch(inputs if from_input else inputs.detach())
        seen = watch.map(layer)  # [N, C, h, w]
        row, column = seen.shape[2] // 2, seen.shape[3] // 2
        units = seen[:, :, row, column]
    return _Path(
        units,
        (row, column),
        seen.shape[2:].numel() > 1,
        inputs if from_input else watch[to],
        first,
        first.channels == 3 and first.grid == shape[1:],
        dict(linear.exchanged),
        list(linear.suspects),
    )


def _reach(handle: Handle, layer: str, to: str) -> _Reach:
    """The part of the map of `to` that the units read, on inputs large enough for it, if the model takes such."""
    shapes = _roomier(handle)
    found = _measured(handle, layer, to, next(shapes))
    for shape in shapes:
        if not found.clipped:
            break
        try:
            found = _measured(handle, layer, to, shape)
        except (RuntimeError, AssertionError):  # a flatten or a position table takes the model's own size only
            break
    return found


def _roomier(handle: Handle) -> Iterator[Shape]:
    """The model's input size, and its doubles."""
    shape = handle.spec.input_size
    if shape is None:
        raise BadInput("this model's input size is not known; give it: tl.wrap(module, input_size=(3, H, W))")
    while True:
        yield shape
        shape = shape[0], 2 * shape[1], 2 * shape[2]
        if handle.spec.fixed_size or max(shape) > LARGEST:
            return


def _measured(handle: Handle, layer: str, to: str, shape: Shape) -> _Reach:
    """The part of the map of `to` that all units together read. Raises unless their gradient is the same anywhere."""
    path = _path(handle, layer, to, shape, images=3)
    if not path.units.requires_grad:
        raise BadInput(f'layer {layer!r} does not depend on {to!r}; to= names a layer before it, or "input"')
    mix = torch.randn(path.units.shape[1], generator=torch.Generator().manual_seed(0)).to(path.units)
    found = path.gradient(mix)
    if not found.isfinite().all():
        raise BadInput(f"the weights of {layer!r} over {to!r} are not finite")
    largest = found.abs().max()
    if (found - found[:1]).abs().max() > ROUNDING * largest:
        between = f" ({', '.join(path.suspects)})" if path.suspects else ""
        raise NotApplicable(
            f"layer {layer!r} has no fixed weights over {to!r}: between them the model multiplies activations or "
            f"normalises by what it sees{between}; name a later layer with to=, or leave it out"
        )
    if largest == 0:
        raise NotApplicable(f"every weight of {layer!r} over {to!r} is zero")
    rows, columns = (found[0].abs().sum(0) > ROUNDING * largest).nonzero(as_tuple=True)
    top, left, bottom, right = (int(one) for one in (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1))
    height, width = found.shape[2:]
    at_border = top == 0 or left == 0 or bottom == height or right == width
    return _Reach(shape, (top, left, bottom, right), path.spatial and at_border)


def _layout(handle: Handle, layer: str, shape: Shape | None = None) -> Layout:
    found = handle.layer(layer, shape)
    if found.layout is None:
        raise NotApplicable(f"layer {layer!r} ({found.kind}) gives no map of channels")
    return found.layout
