"""A model ready to be asked: a module and its `Spec`."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchloupe_core import images as pictures
from torchloupe_core import trace as tracing
from torchloupe_core.borrow import borrowed
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.layout import to_map
from torchloupe_core.pace import Pace
from torchloupe_core.spec import Spec
from torchloupe_core.targets import Bound, Reduce, TargetLike, as_targets
from torchloupe_core.trace import Layer, Trace
from torchloupe_core.watch import Exchange, Place, Watch, hooked

__all__ = ["Guess", "Handle", "Reading", "unwrapped"]

Shape = tuple[int, int, int]
Found = TypeVar("Found")

_KEPT: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Guess:
    """One class the model sees in an image."""

    name: str
    probability: float
    index: int
    logit: float


@dataclass
class Reading:
    """What one forward pass showed: the logits and the maps of the watched layers."""

    handle: Handle
    watch: Watch
    output: Any

    def logits(self) -> Tensor:
        """The model's output as `[N, K]`."""
        return self.handle.logits(self.output)

    def map(self, layer: str) -> Tensor:
        """A watched layer as a canonical map `[N, C, h, w]`."""
        return self.watch.map(layer)


class Handle:
    """A module with its `Spec`: its layers in forward order, its predictions, its activations.

    The module is used as it is, never changed: whatever a question needs (eval mode, frozen parameters, hooks) is
    undone before the answer is returned. `forwards` counts the images sent through the model so far.
    """

    def __init__(self, module: nn.Module, spec: Spec | None = None) -> None:
        self.module = unwrapped(module)
        self.spec = spec or Spec()
        self.forwards = 0
        self._depth = 0
        # Kept beside the module, so that bare modules handed to verb after verb are traced once.
        self._kept = _KEPT.setdefault(self.module, {})

    def __repr__(self) -> str:
        size = "x".join(map(str, self.spec.input_size)) if self.spec.input_size else "unknown size"
        return f"Handle({self.spec.source}/{self.spec.name}, input {size}, {self.device}, {self.spec.preprocess_text})"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """A name for each output, if known."""
        return self.spec.classes

    @property
    def outputs(self) -> int | None:
        """How many outputs the model has, if that is known without running it."""
        if self.spec.classes is not None:
            return len(self.spec.classes)
        return self.trace().outputs if self.spec.input_size else None

    @property
    def device(self) -> torch.device:
        """Where the model is; inputs go there."""
        return self._reference.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type the model computes in."""
        return self._reference.dtype

    @property
    def layers(self) -> dict[str, Layer]:
        """Every module that runs, by dotted name, in forward order, at the model's own input size."""
        return self.trace().layers

    @property
    def features(self) -> str:
        """The last spatial layer that still reaches the output: what CAM and Grad-CAM read unless told otherwise."""
        return self.features_at(self._shape())

    @property
    def embedding(self) -> str:
        """What goes into the classifier, as a layer name."""
        return self.embedding_at(self._shape())

    def embedding_at(self, shape: Shape) -> str:
        """What goes into the classifier for inputs of this shape, as a layer name."""
        trace = self.trace(shape)
        layers, outputs = trace.layers, trace.outputs
        if self.spec.classifier in layers:
            return f"{self.spec.classifier}.in"
        backwards = [layer for layer in reversed(layers.values()) if layer.layout]
        weighted = next((layer for layer in backwards if self._has_weights(layer)), None)
        if weighted and weighted.channels == outputs and self._classifies(weighted):
            return f"{weighted.name}.in"
        if backwards and backwards[0].channels == outputs:  # no classifier: the features are the output
            return backwards[0].name
        raise NotApplicable(
            "no layer gives this model's outputs, so the input of its classifier is unknown; name layer="
        )

    def _has_weights(self, layer: Layer) -> bool:
        return any(True for _ in self.module.get_submodule(layer.name).parameters(recurse=False))

    def _classifies(self, layer: Layer) -> bool:
        """Whether a layer could be the classifier: linear, or a 1x1 convolution before the pooling."""
        if layer.kind.endswith("Conv2d"):
            return getattr(self.module.get_submodule(layer.name), "kernel_size", None) == (1, 1)
        return layer.kind.endswith("Linear") and not layer.spatial

    def layer(self, name: object, shape: Shape | None = None) -> Layer:
        """The layer of that name; `relu#1` is a call of a module that runs several times, `fc.in` its input."""
        trace, place = self.trace(shape), Place.parse(str(name))
        if place.module not in trace.layers:
            known = place.module in dict(self.module.named_modules())
            where = "that runs in the forward pass" if known else ""
            raise UnknownName.of("layer", place.module, trace.layers, where)
        found = trace.layers[place.module]
        if place.call is not None and not 1 <= place.call <= found.calls:
            raise UnknownName(f"no call {place.call} of {place.module!r}; it runs {found.calls} times, counted from 1")
        if place.entering:
            return trace.inputs[place.module]
        return trace.calls[f"{place.module}#{place.call or found.calls}"]

    def trace(self, shape: Shape | None = None) -> Trace:
        """One forward pass written down, made once for each input shape and kept."""
        shape = shape or self._shape()
        return self.kept("trace", shape, lambda: self._traced(shape))

    def kept(self, name: str, shape: Shape, find: Callable[[], Found]) -> Found:
        """What `find` gives, found once for each input shape and as long as the model has the same parts."""
        key = (name, *self._key(shape))
        if key not in self._kept:
            self._kept[key] = find()
        found: Found = self._kept[key]
        return found

    def pace(self, shape: Shape) -> Pace:
        """The batch size found for inputs of this shape, kept beside the module."""
        key = ("pace", shape, self.device, self.dtype)
        if key not in self._kept:
            self._kept[key] = Pace.beginning(*shape[1:], self.device)
        pace: Pace = self._kept[key]
        return pace

    def _traced(self, shape: Shape) -> Trace:
        with self.borrow():
            noise = torch.randn((tracing.BATCH, *shape), generator=torch.Generator().manual_seed(0))
            try:
                return tracing.run(self.module, self.spec, noise.to(self.device, self.dtype), self.logits)
            except Exception as error:
                error.add_note(f"torchloupe was running the model on an input of shape {list(shape)}")
                raise

    def _key(self, shape: Shape) -> tuple[object, ...]:
        """Changes when layers are added, exchanged or removed, or other facts are stated about them."""
        structure = hash(tuple((name, id(part)) for name, part in self.module.named_modules()))
        return shape, self.spec.prefix, self.spec.classifier, str(self.spec.layouts), self.spec.output, structure

    def features_at(self, shape: Shape, before: str | None = None) -> str:
        """The last spatial layer for inputs of this shape that reaches the output, or that ends before a layer."""
        trace = self.trace(shape)
        limit = self.layer(before, shape).begins if before is not None else None
        candidates = [
            layer
            for layer in reversed(trace.layers.values())
            if layer.spatial
            and not layer.passes
            and layer.kind not in ("AdaptiveAvgPool2d", "Flatten")
            and not layer.in_attention
            and (limit is None or layer.ends < limit)
        ]
        if not candidates:
            place = f" before {before!r}" if before else ""
            raise NotApplicable(f"no spatial layer{place}; use a method that reads the input's gradient, as saliency")
        if limit is None and not any(layer.layout and layer.layout.prefix for layer in trace.layers.values()):
            return candidates[0].name
        key = ("features", before, *self._key(shape))
        if key not in self._kept:
            # The classifier's input, not its output: a freshly made head may be all zeros.
            self._kept[key] = self._reaching(before or self.embedding_at(shape), candidates[:24], shape)
        name: str = self._kept[key]
        return name

    def _reaching(self, end: str, candidates: Sequence[Layer], shape: Shape) -> str:
        """The first candidate whose patches the layer `end` depends on.

        A parallel branch does not reach it. After the last attention of a class-token model patches no longer count:
        every map of that layer would be zero.
        """
        generator = torch.Generator().manual_seed(0)
        names = [layer.name for layer in candidates]
        with self.watch(*names, end, shape=shape) as watch, torch.enable_grad():
            watch(torch.randn((1, *shape), generator=generator).to(self.device, self.dtype).requires_grad_(True))
            features = watch[end]
            value = (features * torch.randn(features.shape, generator=generator).to(features)).sum()
            gradients = torch.autograd.grad(value, [watch[name] for name in names], allow_unused=True)
        for layer, gradient in zip(candidates, gradients, strict=True):
            if gradient is not None and layer.layout and to_map(gradient, layer.layout).abs().sum() > 0:
                return layer.name
        raise NotApplicable(
            f"no spatial layer reaches {end!r}; use a method that reads the input's gradient, as saliency"
        )

    @contextlib.contextmanager
    def borrow(self) -> Iterator[None]:
        """The model in eval mode, frozen and uncompiled, and given back as it was. May be nested at no cost."""
        if self._depth:
            yield
            return
        with borrowed(self.module):
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    @contextlib.contextmanager
    def watch(
        self,
        *layers: object,
        through: bool = False,
        leaf: object = None,
        shape: Shape | None = None,
        exchange: Mapping[str, Exchange] | None = None,
    ) -> Iterator[Watch]:
        """Inside: `seen = watch(inputs)` runs one forward pass, `watch["layer4"]` is what that layer gave.

        The pass stops after the last layer needed, unless `through`. `leaf` names the layer where the graph begins:
        everything before runs without one, and gradients are taken with respect to `watch[leaf]`. Gradients are off
        unless switched on inside; the model is borrowed meanwhile. shape: the inputs' (C, H, W), if not the model's.
        exchange: a function for a layer's raw output, whose result the rest of the model gets instead.
        """
        exchange = exchange or {}
        names = (*layers, *exchange, *([leaf] if leaf is not None else []))
        places = {str(name): Place.parse(str(name)) for name in names}
        found = {text: self.layer(text, shape) for text in places}
        parts = {place.module: self.module.get_submodule(place.module) for place in places.values()}
        watch = Watch(
            self.module,
            places,
            calls={name: self.layer(name, shape).calls for name in parts},
            layouts={text: layer.layout for text, layer in found.items()},
            through=through or not places,
            leaf=None if leaf is None else str(leaf),
            exchange=exchange,
            unread=set(exchange) - set(map(str, (*layers, leaf))),
            forward_done=self._count,
        )
        with self.borrow(), hooked(parts, watch.entered, watch.left):
            yield watch

    def read(
        self,
        inputs: Tensor,
        targets: Sequence[Bound],
        *,
        reduce: Reduce = "mean",
        exchange: Mapping[str, Exchange] | None = None,
    ) -> Tensor:
        """The value of each image's target, `[N]`, from one forward pass; differentiable where gradients are on.

        exchange: as in `watch`; it may make several variants of one image, each with its own target.
        """
        distinct = list(dict.fromkeys(targets))
        layers = dict.fromkeys(name for bound in distinct for name in bound.target.layers)
        through = any(bound.target.reads_output for bound in distinct)
        shape = _shape_of(inputs)
        with self.watch(*layers, through=through, shape=shape, exchange=exchange) as watch:
            reading = Reading(self, watch, watch(inputs))
            return pick(reading, targets, reduce)

    def score(self, images: Any, target: TargetLike | Sequence[TargetLike], *, reduce: Reduce = "mean") -> Tensor:
        """The value of a target for each image, `[N]` on the CPU."""
        batch = self.inputs(images)
        targets = self.bind(target, batch)
        with self.borrow():
            return torch.cat(
                [
                    self.read(part, targets[start : start + len(part)], reduce=reduce).cpu()
                    for start, part in _chunks(batch, 8)
                ]
            )

    def bind(self, target: TargetLike | Sequence[TargetLike] | Tensor, inputs: Tensor) -> list[Bound]:
        """One checked target for each input."""
        subject, bound = _At(self, _shape_of(inputs)), {}  # type: _At, dict[Any, Bound]
        targets = as_targets(target, len(inputs))
        for one in targets:
            if one not in bound:
                bound[one] = one.bind(subject)
        return [bound[one] for one in targets]

    def logits(self, output: Any) -> Tensor:
        """The tensor `[N, K]` of a model's output, selected as `spec.output` says."""
        tensor = _selected(output, self.spec.output)
        if tensor.ndim == 1:
            tensor = tensor[:, None]
        if tensor.ndim != 2:
            raise NotApplicable(
                f"the model's output has shape {list(tensor.shape)}, not [N, K]; name a tensor or a function of it "
                "with output=, or ask about a layer"
            )
        return tensor

    def inputs(self, images: Any) -> Tensor:
        """Images of any kind as model inputs `[N, C, H, W]` on the model's device."""
        return pictures.read(images, self.spec, device=self.device, dtype=self.dtype)

    def predict(self, images: Any, k: int = 5) -> list[list[Guess]]:
        """For each image the k most probable classes, best first."""
        inputs = self.inputs(images)
        with self.borrow():
            parts = []
            for _, part in _chunks(inputs, 8):
                with self.watch(shape=_shape_of(part)) as watch:
                    parts.append(self.logits(watch(part)).float().cpu())
        logits = torch.cat(parts)
        if not logits.isfinite().all():
            raise BadInput("the model's output holds NaN or infinity")
        return [self._guesses(row, k) for row in logits]

    def name_of(self, index: int) -> str:
        """The name of a class, or its index as text."""
        classes = self.spec.classes
        return classes[index] if classes is not None and index < len(classes) else str(index)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory_format: torch.memory_format | None = None,
    ) -> Handle:
        """This handle, or one on a copy of the model where anything differs. The model itself stays put.

        memory_format: `torch.channels_last`, as in `nn.Module.to`; with `torch.bfloat16` often the fastest on a CPU.
        """
        device = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        same_place = device.type == self.device.type and device.index in (None, self.device.index)
        if same_place and dtype == self.dtype and memory_format is None:
            return self
        moved = copy.deepcopy(self.module).to(device, dtype)
        return Handle(moved if memory_format is None else moved.to(memory_format=memory_format), self.spec)

    def with_spec(self, **changes: Any) -> Handle:
        """A handle on the same model with other facts."""
        return Handle(self.module, replace(self.spec, **changes))

    def _guesses(self, logits: Tensor, k: int) -> list[Guess]:
        best = logits.topk(min(k, len(logits)))
        probabilities = logits.softmax(0)
        return [
            Guess(self.name_of(index), probabilities[index].item(), index, value)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _shape(self) -> Shape:
        if self.spec.input_size is None:
            raise BadInput("this model's input size is not known; give it: tl.wrap(module, input_size=(3, H, W))")
        return self.spec.input_size

    def _count(self, images: int) -> None:
        self.forwards += images

    @property
    def _reference(self) -> Tensor:
        tensors = (*self.module.parameters(), *self.module.buffers())
        return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


@dataclass(frozen=True)
class _At:
    """A handle at one input shape, for binding targets."""

    handle: Handle
    shape: Shape

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.handle.classes

    @property
    def outputs(self) -> int | None:
        return self.handle.trace(self.shape).outputs

    def layer(self, name: str) -> Layer:
        return self.handle.layer(name, self.shape)


def pick(reading: Reading, targets: Sequence[Bound], reduce: Reduce = "mean") -> Tensor:
    """Each image's own target, `[N]`: every distinct target is read once for the batch."""
    distinct = list(dict.fromkeys(targets))
    values = torch.stack([bound.read(reading, reduce) for bound in distinct])  # [T, N]
    if len(distinct) == 1:
        return values[0]
    row = {bound: index for index, bound in enumerate(distinct)}
    rows = torch.tensor([row[bound] for bound in targets], device=values.device)
    return values[rows, torch.arange(len(targets), device=values.device)]


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `DistributedDataParallel` and `torch.compile` wrappers."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _selected(output: Any, selector: Any) -> Tensor:
    if callable(selector):
        output = selector(output)
    elif selector is not None:
        output = _item(output, selector)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        tensors = {key: value for key, value in output.items() if isinstance(value, Tensor)}
        if "logits" in tensors:
            return tensors["logits"]
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        raise BadInput(f"the model's output is a dict; name its logits with output=, one of {list(output)}")
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise BadInput(f"the model's output is {type(output).__name__}, not a tensor; select one with output=")


def _item(output: Any, selector: str | int) -> Any:
    try:
        return (
            getattr(output, selector) if isinstance(selector, str) and hasattr(output, selector) else output[selector]
        )
    except (LookupError, TypeError) as error:
        has = list(output) if isinstance(output, Mapping) else type(output).__name__
        raise BadInput(f"output={selector!r} selects nothing from the model's output, {has}") from error


def _shape_of(inputs: Tensor) -> Shape:
    return inputs.shape[1], inputs.shape[2], inputs.shape[3]


def _chunks(batch: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, batch[start : start + size]) for start in range(0, len(batch), size))
