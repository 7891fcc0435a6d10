"""One forward pass written down: which modules run, in what order, how often, and how their outputs are laid out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchloupe_core.errors import LoupeError, UnknownName
from torchloupe_core.layout import Grid, Layout, infer, plausible_grid
from torchloupe_core.spec import Spec
from torchloupe_core.watch import Place, first_tensor, hooked

__all__ = ["Layer", "Trace", "is_inside_attention", "run"]

BATCH = 2  # windows and heads folded into the batch dimension show themselves only with more than one image


@dataclass(frozen=True)
class Layer:
    """One module as seen in a forward pass. `channels`, `size` (h, w) and `layout` are None if it gives no map.

    calls: how often it runs. begins, ends: its place in forward order. passes: it hands its input on unchanged.
    in_attention: it runs inside an attention module, where maps of heads and tokens are no pictures.
    """

    name: str
    kind: str
    channels: int | None
    size: Grid | None
    layout: Layout | None
    calls: int = 1
    begins: int = 0
    ends: int = 0
    passes: bool = False
    in_attention: bool = False

    @property
    def spatial(self) -> bool:
        """Whether it gives a map with more than one position."""
        return self.layout is not None and self.layout.spatial

    def __str__(self) -> str:
        return self.name


@dataclass
class Trace:
    """What one forward pass showed. `calls` holds every call under `name#k`, `layers` the last one of each module.

    outputs: K of an output `[N, K]`. rectified: how often ReLU was applied, as a module or as a function.
    """

    image: Grid
    layers: dict[str, Layer] = field(default_factory=dict)
    calls: dict[str, Layer] = field(default_factory=dict)
    inputs: dict[str, Layer] = field(default_factory=dict)
    outputs: int | None = None
    rectified: int = 0

    def layer(self, name: str, known: Collection[str] = ()) -> Layer:
        """The layer of that name; `relu#1` is a call of a module that runs several times, `fc.in` its input.

        known: the names of the model's modules, among which may be some that do not run.
        """
        place = Place.parse(name)
        if place.module not in self.layers:
            where = "that runs in the forward pass" if place.module in known else ""
            raise UnknownName.of("layer", place.module, self.layers, where)
        found = self.layers[place.module]
        if place.call is not None and not 1 <= place.call <= found.calls:
            raise UnknownName(f"no call {place.call} of {place.module!r}; it runs {found.calls} times, counted from 1")
        if place.entering:
            return self.inputs[place.module]
        return self.calls[f"{place.module}#{place.call or found.calls}"]


def run(module: nn.Module, spec: Spec, inputs: Tensor, logits: Callable[[Any], Tensor]) -> Trace:
    """Runs `inputs` (a batch of `BATCH`) once and writes down what each module did. The model is already borrowed.

    logits: finds them in the model's output.
    """
    recorder = _Recorder(spec, inputs)
    parts = {name: part for name, part in module.named_modules() if name}
    with hooked(parts, recorder.enter, recorder.leave), _CountReLU() as relus:
        output = module(inputs)
    trace = recorder.trace
    trace.rectified = relus.count
    with contextlib.suppress(LoupeError):  # a model without logits has layers all the same
        trace.outputs = logits(output).shape[1]
    return trace


class _CountReLU(TorchFunctionMode):
    """Counts rectifications, whether modules or plain functions make them."""

    KINDS = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.KINDS
        return func(*args, **(kwargs or {}))


class _Recorder:
    """The two hooks of a trace. A tensor's layout travels on the tensor itself, as an attribute."""

    def __init__(self, spec: Spec, inputs: Tensor) -> None:
        self.spec, self.clock = spec, 0
        self.grids: list[Grid] = []
        self.image: Grid = (inputs.shape[-2], inputs.shape[-1])
        self.open: list[tuple[str, int, Tensor | None, int]] = []
        self.trace = Trace(self.image)
        self.counts: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self.finished_calls: list[tuple[int, tuple[int, ...], Layout]] = []
        _tag(inputs, Layout("nchw", inputs.shape[1], self.image))

    def enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        tensor = first_tensor(arguments)
        self.kinds[name] = type(module).__name__
        self.open.append((name, self._tick(), tensor, _version(tensor)))

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        while self.open[-1][0] != name:  # a module left by an exception the model itself caught
            self.open.pop()
        _, begins, given, version = self.open.pop()
        call = self.counts[name] = self.counts.get(name, 0) + 1
        tensor = first_tensor(output)
        layout = self._layout(name, module, tensor, given, begins)
        passes = tensor is not None and tensor is given and _version(tensor) == version  # not so an in-place ReLU
        layer = self._layer(name, layout, call, begins, passes=passes)
        self.trace.calls[f"{name}#{call}"] = layer
        self.trace.layers.pop(name, None)  # the last call decides the order
        self.trace.layers[name] = layer
        self.trace.inputs[name] = self._layer(f"{name}.in", self._input_layout(given), call, begins, passes=True)
        if tensor is not None and layout is not None:
            _tag(tensor, layout)
            self.finished_calls.append((begins, tuple(tensor.shape), layout))

    def _layer(self, name: str, layout: Layout | None, call: int, begins: int, *, passes: bool) -> Layer:
        channels = layout.channels if layout else None
        size = layout.grid if layout and layout.order != "vector" else None
        kind = self.kinds[name.removesuffix(".in")]
        inside = self._in_attention(name.removesuffix(".in"))
        return Layer(name, kind, channels, size, layout, call, begins, self._tick(), passes, inside)

    def _in_attention(self, name: str) -> bool:
        """By its own name, or because an attention module calls it, as CoaT's shared position encodings."""
        callers = [f"{one[0]}." for one in self.open]
        return any(is_inside_attention(one, self.kinds) for one in (name, *callers))

    def _layout(
        self, name: str, module: nn.Module, tensor: Tensor | None, given: Tensor | None, begins: int
    ) -> Layout | None:
        if name in self.spec.layouts:
            return self.spec.layouts[name]
        if tensor is None:
            return None
        inherited = _tagged(tensor) or self._child_like(tensor, begins)
        if inherited is None and given is not None and given.shape == tensor.shape:
            inherited = _tagged(given)
        if inherited is not None and inherited.order == "tokens" and tensor.ndim == 3:
            return inherited
        layout = infer(
            tensor,
            module,
            image=self.image,
            batch=BATCH,
            grids=self.grids,
            prefix=self.spec.prefix,
            inherited=inherited,
            inside_attention=self._in_attention(name),
        )
        if layout and layout.order in ("nchw", "nhwc") and layout.spatial and plausible_grid(layout.grid, self.image):
            self.grids.append(layout.grid)
        return layout

    def _input_layout(self, given: Tensor | None) -> Layout | None:
        if given is None:
            return None
        tagged = _tagged(given)
        if tagged is not None:
            return tagged
        return infer(given, nn.Identity(), image=self.image, batch=BATCH, grids=self.grids, prefix=self.spec.prefix)

    def _child_like(self, tensor: Tensor, begins: int) -> Layout | None:
        """The layout of the latest child whose output has this shape: a sum or activation made from it."""
        for child_begins, shape, layout in reversed(self.finished_calls):
            if child_begins < begins:
                return None
            if shape == tuple(tensor.shape):
                return layout
        return None

    def _tick(self) -> int:
        self.clock += 1
        return self.clock


def is_inside_attention(name: str, kinds: Mapping[str, str]) -> bool:
    """Whether a module is part of an attention module, where maps of heads and tokens are no pictures."""
    parts = name.split(".")
    return any(
        re.search("attention|attn|mhsa", f"{part} {kinds.get('.'.join(parts[: n + 1]), '')}", re.IGNORECASE)
        and "block" not in part
        for n, part in enumerate(parts[:-1])
    )


def _version(tensor: Tensor | None) -> int:
    """How often a tensor has been written to; tensors made in inference mode do not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _tag(tensor: Tensor, layout: Layout) -> None:
    tensor._torchloupe_layout = layout  # type: ignore[attr-defined]


def _tagged(tensor: Tensor) -> Layout | None:
    layout: Layout | None = getattr(tensor, "_torchloupe_layout", None)
    return layout if layout is None or _fits(tensor, layout) else None


def _fits(tensor: Tensor, layout: Layout) -> bool:
    return tensor.ndim == {"nchw": 4, "nhwc": 4, "tokens": 3, "vector": 2}[layout.order]
