"""A model's parameters as one row of numbers, module by module, and what each module's gradient is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.handle import Handle

__all__ = ["Call", "Piece", "chosen_parameters", "piece_of", "pieces_of"]


@dataclass(frozen=True)
class Piece:
    """The parameters of one module as `size` numbers. `names` in the model, weight before bias.

    matrix: whether it is a linear map of what it reads, a linear layer or convolution; then the numbers are the rows
    of `[outputs, inputs + bias]`, in `groups` blocks of equal width.
    """

    module: str
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    matrix: bool = False
    groups: int = 1

    @property
    def size(self) -> int:
        """How many numbers."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def outputs(self) -> int:
        """Rows of the matrix in each group."""
        return self.shapes[0][0] // self.groups

    @property
    def inputs(self) -> int:
        """Columns of the matrix, the bias among them."""
        return math.prod(self.shapes[0][1:]) + len(self.shapes) - 1

    def packed(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """`[..., size]` of the parameters, or of tensors like them with dimensions before theirs."""
        weight, *bias = (tensors[name] for name in self.names)
        if not self.matrix:
            lead = weight.ndim - len(self.shapes[0])
            return torch.cat([one.flatten(lead) for one in (weight, *bias)], -1)
        lead = weight.ndim - len(self.shapes[0]) + 1
        rows = weight.flatten(lead)  # [..., outputs, inputs]
        return torch.cat([rows, *(one[..., None] for one in bias)], -1).flatten(-2)

    def unpacked(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """The tensors that `[size]` numbers stand for."""
        if self.matrix:
            rows = numbers.view(self.shapes[0][0], self.inputs)
            bias = len(self.shapes) - 1
            weight = rows[:, : self.inputs - bias].reshape(self.shapes[0])
            return (weight, rows[:, -1]) if bias else (weight,)
        parts = torch.split(numbers, [math.prod(shape) for shape in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))


@dataclass(frozen=True)
class Call:
    """One call of a linear layer or convolution: what it was given, and m tensors that came back to its output.

    Its gradient for an image is the sum over L positions of products of what is read there and what comes back. Both
    are laid out when asked for, as patches take much memory.
    """

    piece: Piece
    module: nn.Module
    given: Tensor
    gots: tuple[Tensor, ...]
    images: int

    def reads(self) -> Tensor:
        """`[N, L, G, I]`: what the weights are multiplied with at each position, and a 1 where there is a bias.

        Where windows or heads are folded into the batch they are positions of their image.
        """
        given, groups = self.given, self.piece.groups
        if isinstance(self.module, nn.Conv2d):
            given = _patches(self.module, given).transpose(1, 2)  # [N, L, C * kh * kw]
        read = given.reshape(self.images, -1, groups, given.shape[-1] // groups)
        if len(self.piece.names) == 2:
            read = torch.cat([read, read.new_ones(*read.shape[:3], 1)], 3)
        return read

    def backs(self) -> Iterator[Tensor]:
        """`[N, L, G, O]`, m times: what comes back to each position."""
        for got in self.gots:
            back = got.flatten(2).transpose(1, 2) if isinstance(self.module, nn.Conv2d) else got  # [N, L, C]
            yield back.reshape(self.images, -1, self.piece.groups, self.piece.outputs)

    def gradients(self) -> Iterator[Tensor]:
        """`[N, size]`, m times: of each image."""
        reads = self.reads()
        return (torch.einsum("nlgo,nlgi->ngoi", back, reads).flatten(1) for back in self.backs())


def pieces_of(handle: Handle, names: Sequence[str]) -> list[Piece]:
    """The named parameters, module by module in the model's order."""
    modules = dict(handle.module.named_modules())
    owned: dict[str, list[str]] = {}
    for name in names:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    return [piece_of(module, modules[module], own) for module, own in owned.items()]


def piece_of(name: str, module: nn.Module, names: Sequence[str]) -> Piece:
    """The chosen parameters of one module."""
    parameters = dict(module.named_parameters(recurse=False))
    shapes = tuple(parameters[one.rpartition(".")[2]].shape for one in names)
    own = [one.rpartition(".")[2] for one in names]
    whole = own == [one for one in ("weight", "bias") if one in parameters] and len(own) == len(parameters)
    matrix = whole and (_is_linear(module) or _is_convolution(module))
    return Piece(name, tuple(names), shapes, matrix, module.groups if isinstance(module, nn.Conv2d) and matrix else 1)


def chosen_parameters(handle: Handle, layers: str | Sequence[object]) -> tuple[str, ...]:
    """The names of the parameters of layers, or of "all", in the model's order; those that training may change.

    Asked before the model is borrowed, which freezes all. A layer stands for all that is in it. Raises `UnknownName`
    for a layer that is not there, `BadInput` for one without parameters or with frozen ones only.
    """
    free = {name: parameter.requires_grad for name, parameter in handle.module.named_parameters()}
    if not any(free.values()):  # a model loaded to be looked at
        free = dict.fromkeys(free, True)
    if isinstance(layers, str) and layers == "all":
        return tuple(name for name, trained in free.items() if trained)
    asked = [layers] if isinstance(layers, str) else [str(one) for one in layers]
    if not asked:
        raise BadInput("layers names no layer; leave it out for the head, or take 'all'")
    modules, found = dict(handle.module.named_modules()), set()
    for layer in asked:
        if layer not in modules or not layer:
            raise UnknownName.of("layer", layer, [name for name in modules if name])
        inside = [name for name in free if name.startswith(f"{layer}.")]
        if not inside:
            raise BadInput(f"layer {layer!r}, a {type(modules[layer]).__name__}, has no parameters")
        if not any(free[name] for name in inside):
            raise BadInput(
                f"the parameters of layer {layer!r} are frozen (requires_grad=False), so no training image has any "
                "influence through them"
            )
        found |= {name for name in inside if free[name]}
    return tuple(name for name in free if name in found)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and type(module)._conv_forward is nn.Conv2d._conv_forward
    )


def _patches(module: nn.Conv2d, given: Tensor) -> Tensor:
    """`[N, C * kh * kw, L]`: the patches a convolution reads."""
    # The two last dimensions from the last to the first, as F.pad counts; "same" may pad one side more.
    padding = [int(one) for one in module._reversed_padding_repeated_twice]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(given, padding, mode=mode) if any(padding) else given
    return F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
