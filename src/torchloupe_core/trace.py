"""One forward pass written down: which modules run, in what order, how often, and how their outputs are laid out."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchloupe_core.errors import LoupeError, UnknownName
from torchloupe_core.layout import MOST_PREFIX, Grid, Layout, infer, plausible_grid
from torchloupe_core.outputs import Form, form_of, selected
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

    form: what the output holds. outputs: K of an output `[N, K]` or `[N, K, H, W]`. rectified: how often ReLU was
    applied, as a module or as a function.
    """

    image: Grid
    layers: dict[str, Layer] = field(default_factory=dict)
    calls: dict[str, Layer] = field(default_factory=dict)
    inputs: dict[str, Layer] = field(default_factory=dict)
    outputs: int | None = None
    form: Form | None = None
    rectified: int = 0
    _sources: dict[str, int] = field(default_factory=dict)  # of each layer's last input, and of the output under ""
    _bits: dict[str, int] = field(default_factory=dict)

    def leads(self, layer: str, end: str | None = None) -> bool:
        """Whether `end`, by default the model's output, was seen to be computed from what `layer` gave.

        Seen by torch's functions: a detour through numpy or a compiled function hides it.
        """
        return bool(self._sources.get(end or "", 0) & self._bits.get(layer, 0))

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


def run(module: nn.Module, spec: Spec, inputs: Tensor) -> Trace:
    """Runs `inputs` (a batch of `BATCH`) once and writes down what each module did. The model is already borrowed."""
    recorder = _Recorder(spec, inputs)
    parts = {name: part for name, part in module.named_modules() if name}
    with hooked(parts, recorder.enter, recorder.leave), _Functions() as functions:
        output = module(inputs)
        with contextlib.suppress(LoupeError):  # a model without logits has layers all the same
            output = selected(output, spec.output)
            recorder.trace.form, recorder.trace.outputs = form_of(output)
    trace = recorder.trace
    trace.rectified = functions.rectified
    trace._sources[""] = _sources(output)
    return trace


class _Functions(TorchFunctionMode):
    """Sees every torch function: counts rectifications, whether modules or plain functions make them, and hands what
    their arguments were computed from on to their results."""

    RECTIFYING = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})

    def __init__(self) -> None:
        super().__init__()
        self.rectified = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.rectified += func in self.RECTIFYING
        result = func(*args, **(kwargs or {}))
        if sources := _sources((args, kwargs)):
            _derive(args[0] if func is Tensor.__setitem__ else result, sources)
        return result


@dataclass
class _Call:
    """A module that has begun to run.

    version: how often its input was written to. sources: what its input was computed from. attention: it is an
    attention module, or in one. grids: where its input may lie; seen: how many maps came before it.
    """

    name: str
    begins: int
    given: Tensor | None
    version: int
    sources: int
    inside_attention: bool
    attention: bool
    grids: list[Grid]
    seen: int


class _Recorder:
    """The two hooks of a trace. A tensor's layout travels on the tensor itself, as an attribute."""

    def __init__(self, spec: Spec, inputs: Tensor) -> None:
        self.spec, self.clock = spec, 0
        self.grids: list[Grid] = []
        self.prefixes = {0}  # how many tokens came before the patches so far
        self.channels_last = False  # whether a map [N, h, w, C] was seen
        self.stated: dict[int, Layout] = {}  # of tokens, by their number
        self.image: Grid = (inputs.shape[-2], inputs.shape[-1])
        self.open: list[_Call] = []
        self.trace = Trace(self.image)
        self.counts: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self.finished_calls: list[tuple[int, tuple[int, ...], Layout]] = []
        _tag(inputs, Layout("nchw", inputs.shape[1], self.image))

    def enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        tensor = first_tensor(arguments)
        self.kinds[name] = type(module).__name__
        # By its own name, or because an attention module calls it, as CoaT's shared position encodings.
        inside = any(one.attention for one in self.open[-1:]) or is_inside_attention(name, self.kinds)
        attention = inside or is_inside_attention(f"{name}.", self.kinds)
        grids = self._grids_of(tensor) if attention and not inside else []
        version, sources = _version(tensor), _sources(arguments)
        call = _Call(name, self._tick(), tensor, version, sources, inside, attention, grids, len(self.grids))
        self.open.append(call)

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        while self.open[-1].name != name:  # a module left by an exception the model itself caught
            self.open.pop()
        call = self.open.pop()
        times = self.counts[name] = self.counts.get(name, 0) + 1
        tensor = first_tensor(output)
        layout = self._layout(module, tensor, call)
        passes = tensor is not None and tensor is call.given and _version(tensor) == call.version  # no in-place ReLU
        layer = self._layer(call, name, layout, times, passes=passes)
        self.trace.calls[f"{name}#{times}"] = layer
        self.trace.layers.pop(name, None)  # the last call decides the order
        self.trace.layers[name] = layer
        no_map = name in self.spec.layouts and self.spec.layouts[name] is None
        entering = None if no_map else self._input_layout(call.given)
        if entering is None and isinstance(module, (nn.ReLU, nn.ReLU6)) and not no_map:
            entering = layout  # a sum [N, C, C, C], whose own sides tell nothing
        self.trace.inputs[name] = self._layer(call, f"{name}.in", entering, times, passes=True)
        self.trace._sources[name] = call.sources
        _derive(output, call.sources | self.trace._bits.setdefault(name, 1 << len(self.trace._bits)))
        if tensor is not None and (layout is not None or isinstance(module, nn.Conv1d)):
            _tag(tensor, layout)
        if tensor is not None and layout is not None:
            self._remember(name, tensor, layout, call)

    def _remember(self, name: str, tensor: Tensor, layout: Layout, call: _Call) -> None:
        self.finished_calls.append((call.begins, tuple(tensor.shape), layout))
        if layout.spatial and layout.grid not in self.grids[-1:] and plausible_grid(layout.grid, self.image):
            self.grids.append(layout.grid)
        self.channels_last |= layout.order == "nhwc"
        if layout.order == "tokens":
            self.prefixes.add(layout.prefix)
            if name in self.spec.layouts:
                self.stated[tensor.shape[1]] = layout

    def _layer(self, call: _Call, name: str, layout: Layout | None, times: int, *, passes: bool) -> Layer:
        channels = layout.channels if layout else None
        size = layout.grid if layout and layout.order != "vector" else None
        kind, ends = self.kinds[call.name], self._tick()
        return Layer(name, kind, channels, size, layout, times, call.begins, ends, passes, call.inside_attention)

    def _layout(self, module: nn.Module, tensor: Tensor | None, call: _Call) -> Layout | None:
        if call.name in self.spec.layouts:
            return self.spec.layouts[call.name]
        if tensor is None or _is_no_map(tensor):
            return None
        inherited = _tagged(tensor) or self._child_like(tensor, call.begins)
        fed = None if call.given is None else _tagged(call.given)
        unclear = _is_cubic(tensor) and self.channels_last and next(module.children(), None) is not None
        if inherited is None and call.given is not None and call.given.shape == tensor.shape and not unclear:
            inherited = fed
        if inherited is None and _is_cubic(tensor) and not self.channels_last:
            inherited = Layout("nchw", tensor.shape[1], (tensor.shape[2], tensor.shape[3]))
        if inherited is not None and inherited.order == "tokens" and tensor.ndim == 3:
            return inherited
        if tensor.ndim == 3 and tensor.shape[1] in self.stated:
            return replace(self.stated[tensor.shape[1]], channels=tensor.shape[2])
        return infer(
            tensor,
            module,
            image=self.image,
            batch=BATCH,
            grids=self._grids_in_attention(call) if call.attention else self.grids,
            prefix=self.spec.prefix,
            prefixes=sorted(self.prefixes) if call.attention else range(MOST_PREFIX + 1),
            inherited=inherited,
            fed=fed,
            attention=call.attention,
            inside_attention=call.inside_attention,
        )

    def _grids_of(self, given: Tensor | None) -> list[Grid]:
        """The grids that an attention module's input may lie on."""
        if given is None:
            return []
        if (layout := _tagged(given)) is not None:
            return [layout.grid]
        if given.ndim == 4:
            height, width = given.shape[-2:]
            return [grid for grid in ((height, width), (given.shape[1], height)) if grid in self.grids]
        return [one for one in self.grids if given.ndim == 3 and given.shape[1] - one[0] * one[1] in self.prefixes]

    def _grids_in_attention(self, call: _Call) -> list[Grid]:
        """The grids of the attention module that runs: its input's, and those that its parts made."""
        outermost = next((one for one in self.open if one.attention), call)
        return [*outermost.grids, *self.grids[outermost.seen :]]

    def _input_layout(self, given: Tensor | None) -> Layout | None:
        if given is None or _is_no_map(given):
            return None
        tagged = _tagged(given)
        if tagged is not None:
            return tagged
        return infer(given, nn.Identity(), image=self.image, batch=BATCH, grids=self.grids, prefix=self.spec.prefix)

    def _child_like(self, tensor: Tensor, begins: int) -> Layout | None:
        """The layout of the latest child whose output has this shape: a sum or activation made from it.

        Not where all sides are equal in a model of both orders: the child's may be the other one.
        """
        if _is_cubic(tensor) and self.channels_last:
            return None
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
    outer = [(part, kinds.get(".".join(parts[: n + 1]), "")) for n, part in enumerate(parts[:-1])]
    return any(_ATTENTION.match(part) or ("block" not in part and _ATTENTION.match(kind)) for part, kind in outer)


# A block or stage of attention modules is none itself.
_ATTENTION = re.compile("(?!.*block).*(attention|attn|mhsa)", re.IGNORECASE)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a tensor, tuple, list or dict, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _sources(value: Any) -> int:
    """The layers that tensors were computed from, one bit for each."""
    return functools.reduce(int.__or__, (getattr(one, "_torchloupe_sources", 0) for one in _tensors(value)), 0)


def _derive(value: Any, sources: int) -> None:
    for tensor in _tensors(value):
        tensor._torchloupe_sources = _sources(tensor) | sources  # type: ignore[attr-defined]


def _version(tensor: Tensor | None) -> int:
    """How often a tensor has been written to; tensors made in inference mode do not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _tag(tensor: Tensor, layout: Layout | None) -> None:
    tensor._torchloupe_layout = layout  # type: ignore[attr-defined]


def _tagged(tensor: Tensor) -> Layout | None:
    layout: Layout | None = getattr(tensor, "_torchloupe_layout", None)
    return layout if layout is None or _fits(tensor, layout) else None


def _is_cubic(tensor: Tensor) -> bool:
    """Whether channels, rows and columns are equally many, so that shape tells nothing."""
    return tensor.ndim == 4 and tensor.shape[1] == tensor.shape[2] == tensor.shape[3]


def _is_no_map(tensor: Tensor) -> bool:
    """Whether it is known to hold no map: `[N, C, L]` of a one-dimensional convolution."""
    return getattr(tensor, "_torchloupe_layout", tensor) is None


def _fits(tensor: Tensor, layout: Layout) -> bool:
    return tensor.ndim == {"nchw": 4, "nhwc": 4, "tokens": 3, "vector": 2}[layout.order]
