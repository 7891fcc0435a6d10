"""The truth about receptive fields: the support of the gradient of one position on the linearised network.

Activations and batch normalisation become the identity, maxima averages, and weights positive, so that nothing that is
read cancels or is switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchloupe_core.handle import Handle
from torchloupe_core.layout import to_map
from torchloupe_core.watch import first_tensor

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.BatchNorm2d)
FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, torch.sigmoid, Tensor.sigmoid, F.silu, F.gelu}
Support = tuple[int, int, int, int]


class _Mixing(nn.Module):
    """In place of a layer normalisation: each element and the mean of its channels, of size 1 for attention's sake."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + x.mean(self.dim, keepdim=True)) / x.detach().mean()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim


class _Linear(TorchFunctionMode):
    """Functions of torch that are switches, linearised."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            return args[0].clone()
        if func in (F.max_pool2d, torch.max_pool2d):
            names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            given = {name: given[name] for name in names if name in given and name != "dilation"}
            return F.avg_pool2d(**given)
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            scores = args[0]
            return func(scores.masked_fill(scores < scores.detach().amax() - 50, -torch.inf), *args[1:], **kwargs)
        return func(*args, **kwargs)


def linearised(module: nn.Module) -> nn.Module:
    """A copy in float64 with positive weights; the original stays as it is."""
    generator = torch.Generator().manual_seed(0)
    found = copy.deepcopy(module).double().eval()
    for name, part in list(found.named_modules()):
        owner = found.get_submodule(name.rpartition(".")[0])
        if isinstance(part, ACTIVATIONS):
            setattr(owner, name.rpartition(".")[2], nn.Identity())
        elif isinstance(part, nn.LayerNorm):
            channels_first = type(part).__name__ == "LayerNorm2d"
            setattr(owner, name.rpartition(".")[2], _Mixing(1 if channels_first else -1))
    for parameter in found.parameters():
        positive = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
        parameter.data = positive / max(1, parameter[0].numel() if parameter.ndim > 1 else 1)
    return found


class Truth:
    """The linearised network on one image, for asking what positions of some layers read."""

    def __init__(self, handle: Handle, layers: Sequence[str], size: tuple[int, int, int]) -> None:
        module, seen = linearised(handle.module), dict[str, list[Tensor]]()
        for layer in layers:
            name, outputs = layer.partition("#")[0], seen.setdefault(layer, [])
            module.get_submodule(name).register_forward_hook(lambda *given, kept=outputs: kept.append(given[2]))
        self.image = torch.rand(1, *size, dtype=torch.float64).requires_grad_(True)
        with _Linear(), torch.enable_grad():
            module(self.image)
        self.maps = {}  # [C, h, w]
        for layer, outputs in seen.items():
            tensor, layout = (
                first_tensor(outputs[int(layer.partition("#")[2] or 0) - 1]),
                handle.layer(layer, size).layout,
            )
            assert tensor is not None and layout is not None
            self.maps[layer] = to_map(tensor, layout)[0]

    def support(self, layer: str, row: int, col: int, channel: int | None = None) -> Support:
        """The smallest box (top, left, bottom, right) around the pixels that the position reads; zeros if none."""
        values = self.maps[layer][:, row, col]
        value = values.sum() if channel is None else values[channel]
        (gradient,) = torch.autograd.grad(value, self.image, retain_graph=True)
        read = (gradient[0] != 0).any(0)
        if not read.any():
            return 0, 0, 0, 0
        (rows,), (cols,) = read.any(1).nonzero(as_tuple=True), read.any(0).nonzero(as_tuple=True)
        return int(rows.min()), int(cols.min()), int(rows.max()) + 1, int(cols.max()) + 1
