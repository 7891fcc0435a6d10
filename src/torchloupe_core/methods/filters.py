"""The weights of a layer as pictures: its own kernels, and its kernels over an earlier layer.

`images[f, j]` of a filter f is its weight on input channel `inputs[f, j]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchloupe_core.borrow import kept_randomness
from torchloupe_core.channels import select
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.layout import to_map

__all__ = ["Kernels", "by_norm", "class_names", "own_kernels", "weight_layers"]

INPUT = "input"  # the name of what goes into the model
WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass
class Kernels:
    """What was found: `images [F, C, kh, kw]` (rows of a linear layer `[F, C]`), and the input channels `[F, C]`.

    layer: the module that holds them. channels: the output channel of each filter. colour: whether the inputs are the
    red, green and blue of the picture. facts: what a reader needs to judge them.
    """

    images: Tensor
    inputs: Tensor
    layer: str
    channels: Sequence[int]
    colour: bool
    facts: dict[str, Any] = field(default_factory=dict)


def own_kernels(handle: Handle, layer: str, channels: Sequence[int] | int | None = None) -> Kernels:
    """The weights of a convolution or linear layer, or of the one such layer inside the module named.

    A linear layer on a flattened map is read as kernels of the map's size. Maps of more than one input channel are
    sorted by norm, largest first, the input channels with them; colours and rows keep the model's order.
    """
    name, module = _resolved(handle.module, layer)
    facts: dict[str, Any] = {"kind": _kind(module)}
    with handle.borrow():
        weight, inputs = _per_output(module, _weight_in_use(module))
        chosen = select(channels, len(weight), name)
        weight, inputs = weight[chosen], inputs[chosen]
        if weight.ndim == 2:
            weight, source = _unflattened(handle, name, weight)
            if source is not None:
                facts["flattened"] = source
                inputs = torch.arange(weight.shape[1]).expand(len(weight), -1)
            colour = source == INPUT and weight.shape[1] == 3
        else:
            colour = _reads_colours(handle, name, module)
    weight = weight.detach().float().cpu()
    if weight.ndim == 4 and not colour:
        weight, inputs = by_norm(weight, inputs)
    return Kernels(weight.contiguous(), inputs.contiguous(), name, chosen, colour, facts)


def by_norm(images: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Each filter's maps `[F, C, kh, kw]`, those of largest norm first, and their input channels `[F, C]` likewise."""
    order = images.flatten(2).norm(dim=2).argsort(dim=1, descending=True, stable=True)
    return images.take_along_dim(order[:, :, None, None], 1), inputs.take_along_dim(order, 1)


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers in a module, by dotted name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, WEIGHTED)}


def class_names(handle: Handle, layer: str, channels: Sequence[int]) -> tuple[str, ...]:
    """The class of each channel, if the layer is the classifier and its classes are known."""
    classes = handle.classes
    if classes is None or max(channels) >= len(classes) or not _classifies(handle, layer):
        return ()
    return tuple(classes[channel] for channel in channels)


def _classifies(handle: Handle, layer: str) -> bool:
    if handle.spec.classifier is not None or handle.spec.input_size is None:
        return layer == (handle.spec.classifier or next(reversed(weight_layers(handle.module)), None))
    try:
        return handle.embedding == f"{layer}.in"
    except NotApplicable:
        return False


def _resolved(model: nn.Module, layer: str) -> tuple[str, nn.Module]:
    """The layer that holds the weights: the one named, or the only one inside it, as in a patch embedding."""
    parts = {name: part for name, part in model.named_modules() if name}
    if layer not in parts:
        raise UnknownName.of("layer", layer, parts)
    inside = {f"{layer}.{name}" if name else layer: part for name, part in weight_layers(parts[layer]).items()}
    if len(inside) > 1:
        raise BadInput(f"layer {layer!r} holds {len(inside)} layers with weights; name one of them: {_few(inside)}")
    if not inside:
        near = sorted(weight_layers(model), key=lambda name: -_shared(name, layer))
        kind = type(parts[layer]).__name__
        raise NotApplicable(f"layer {layer!r} ({kind}) holds no filters; other layers do: {_few(near)}")
    return next(iter(inside.items()))


def _few(names: Any, most: int = 6) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _shared(one: str, other: str) -> int:
    """How many leading parts of two dotted names agree."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)


def _kind(module: Any) -> str:
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} {module.in_features} to {module.out_features}"
    size = "x".join(map(str, module.kernel_size))
    groups = f", {module.groups} groups" if module.groups > 1 else ""
    return f"{type(module).__name__} {module.in_channels} to {module.out_channels}, {size}{groups}"


def _per_output(module: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight with the output channel first, `[F, C, kh, kw]` or `[F, C]`, and its input channels `[F, C]`."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.ConvTranspose2d):  # [C, F / groups, kh, kw]
        weight = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    count, width = weight.shape[0], weight.shape[1]
    group = torch.arange(count) // (count // groups)
    return weight, group[:, None] * width + torch.arange(width)


def _weight_in_use(module: Any) -> Tensor:
    """The parameter, or what the forward of a class of its own makes of it, as weight standardisation does."""
    weight: Tensor = module.weight
    if type(module).forward in [kind.forward for kind in WEIGHTED]:
        return weight
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (1, module.in_features)
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        shape = (1, module.in_channels, *reach)
    with _Operands() as seen, kept_randomness():
        module.forward(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
    return next((one for one in seen.weights if one.shape == weight.shape), weight)


class _Operands(TorchFunctionMode):
    """Notes the weights that convolutions and linear functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("conv2d", "conv_transpose2d", "linear"):
            self.weights.append(args[1] if len(args) > 1 else kwargs["weight"])
        return func(*args, **(kwargs or {}))


def _reads_colours(handle: Handle, name: str, module: Any) -> bool:
    """Whether a convolution's three input channels are those of the picture."""
    if module.in_channels != 3 or module.groups != 1 or handle.spec.channels not in (None, 3):
        return False
    if handle.spec.input_size is None:
        return name == next(iter(weight_layers(handle.module)))
    trace = handle.trace()
    entering = trace.inputs.get(name)
    return entering is not None and entering.size == trace.image


def _unflattened(handle: Handle, name: str, weight: Tensor) -> tuple[Tensor, str | None]:
    """Rows `[K, C * h * w]` of a layer on a flattened map as `[K, C, h, w]`, and which map it is.

    Only where a forward pass shows that the layer's input is that map, flattened; else the rows and None.
    """
    if handle.spec.input_size is None or name not in handle.trace().layers:
        return weight, None
    trace = handle.trace()
    before = [
        layer
        for layer in reversed(trace.layers.values())
        if layer.ends < trace.layers[name].begins
        and layer.layout is not None
        and layer.layout.order in ("nchw", "nhwc")
        and layer.layout.spatial
        and layer.layout.channels * math.prod(layer.layout.grid) == weight.shape[1]
    ][:1]
    noise = torch.randn((1, *handle.spec.input_size), generator=torch.Generator().manual_seed(0))
    with handle.watch(f"{name}.in", *before) as watch:
        inputs = noise.to(handle.device, handle.dtype)
        watch(inputs)
        given = watch[f"{name}.in"]
        for layer in before:
            if torch.equal(watch[layer].flatten(1), given) and layer.layout is not None:
                return to_map(weight.reshape(-1, *watch[layer].shape[1:]), layer.layout), layer.name
    if torch.equal(inputs.flatten(1), given):
        return weight.reshape(-1, *inputs.shape[1:]), INPUT
    return weight, None
