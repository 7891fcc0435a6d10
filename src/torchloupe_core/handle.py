"""A model ready to be asked: a module and its `Spec`."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchloupe_core import images as pictures
from torchloupe_core import outputs
from torchloupe_core import trace as tracing
from torchloupe_core.atoms import Reduce
from torchloupe_core.borrow import borrowed
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.layout import to_map
from torchloupe_core.pace import Pace
from torchloupe_core.spec import Spec
from torchloupe_core.targets import Bound, TargetLike, as_targets
from torchloupe_core.trace import Layer, Trace
from torchloupe_core.watch import Exchange, Place, Watch, hooked, on_gradient

__all__ = ["Guess", "Handle", "Reading", "unwrapped"]

Shape = tuple[int, int, int]
Found = TypeVar("Found")

COARSEST = 32  # pixels, the stride of the deepest stage of the usual encoders

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
    """What one forward pass showed: the output in each of its forms, and the maps of the watched layers."""

    handle: Handle
    watch: Watch
    output: Any

    def logits(self) -> Tensor:
        """The model's output as `[N, K]`."""
        return self.handle.logits(self.output)

    def class_maps(self) -> Tensor:
        """The model's output as `[N, K, H, W]`."""
        return outputs.class_maps(self.output, self.handle.spec.output)

    def detections(self) -> outputs.Detections:
        """The model's output as the boxes, labels and scores of each image."""
        return outputs.detections(self.output, self.handle.spec.output)

    def embedding(self, layer: str | None = None) -> Tensor:
        """`[N, D]`: the model's output, or the mean over positions of a watched layer."""
        return self.logits() if layer is None else self.map(layer).mean((2, 3))

    def map(self, layer: str) -> Tensor:
        """A watched layer as a canonical map `[N, C, h, w]`."""
        return self.watch.map(layer)


class Handle:
    """A module with its `Spec`: its layers in forward order, its predictions, its activations.

    The module is used as it is, never changed: whatever a question needs (eval mode, frozen parameters, hooks) is
    undone before the answer is returned. `forwards` counts the images sent through the model so far,
    `backwards` those whose target a gradient was taken of.
    """

    def __init__(self, module: nn.Module, spec: Spec | None = None) -> None:
        self.module = unwrapped(module)
        self.spec = spec or Spec()
        self.forwards = 0
        self.backwards = 0
        self._depth = 0
        self._structure: int | None = None  # known while the model is borrowed
        # Kept beside the module, so that bare modules handed to verb after verb are traced once.
        self._kept = _KEPT.setdefault(self.module, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self.module, self.spec)  # to other processes; what is kept beside the module is found anew

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
        return self.features_at(self.input_shape)

    @property
    def embedding(self) -> str:
        """What goes into the classifier, as a layer name."""
        return self.embedding_at(self.input_shape)

    def embedding_at(self, shape: Shape) -> str:
        """What goes into the classifier for inputs of this shape, as a layer name."""
        trace = self.trace(shape)
        layers, outputs = trace.layers, trace.outputs
        if self.spec.classifier in layers:
            return f"{self.spec.classifier}.in"
        backwards = [layer for layer in reversed(layers.values()) if layer.layout]
        backwards = [layer for layer in backwards if trace.leads(layer.name)] or backwards  # no side branch
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
        return self.trace(shape).layer(str(name), dict(self.module.named_modules()))

    def trace(self, shape: Shape | None = None) -> Trace:
        """One forward pass written down, made once for each input shape and kept."""
        shape = shape or self.input_shape
        return self.kept("trace", shape, lambda: self._traced(shape))

    def kept(self, what: object, shape: Shape, find: Callable[[], Found]) -> Found:
        """What `find` gives, found once for each input shape and as long as the model has the same parts."""
        key = (what, *self._key(shape))
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
                return tracing.run(self.module, self.spec, noise.to(self.device, self.dtype))
            except Exception as error:
                error.add_note(f"torchloupe was running the model on an input of shape {list(shape)}")
                raise

    def _key(self, shape: Shape) -> tuple[object, ...]:
        """Changes when layers are added, exchanged or removed, or other facts are stated about them."""
        if self._structure is None or not self._depth:
            self._structure = hash(tuple((name, id(part)) for name, part in self.module.named_modules()))
        spec = self.spec
        return shape, spec.prefix, spec.classifier, str(spec.layouts), spec.output, self._structure

    def features_at(self, shape: Shape, before: str | None = None) -> str:
        """The last spatial layer for inputs of this shape that reaches the output, or that ends before a layer.

        Where the output is a map of classes it is the bottleneck: right before the classifier Grad-CAM would only show
        the class's logits again, whatever the region (Vinogradova et al. 2020). A fact `features` of the spec wins.
        """
        trace = self.trace(shape)
        if before is None and self.spec.features is not None:
            return self.layer(self.spec.features, shape).name
        if before is None and trace.form == "detections":
            raise NotApplicable("a detector reads several layers at once; name one of its backbone with layer=")
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
        if before is None and trace.form == "maps":
            return self._bottleneck(candidates, shape)
        prefixed = any(layer.layout and layer.layout.prefix for layer in trace.layers.values())
        if not prefixed and trace.leads(candidates[0].name, before):
            return candidates[0].name
        key = ("features", before, *self._key(shape))
        if key not in self._kept:
            leading = [layer for layer in candidates if trace.leads(layer.name, before)] or candidates
            # The classifier's input, not its output: a freshly made head may be all zeros.
            self._kept[key] = self._reaching(before or self.embedding_at(shape), leading[:24], shape)
        name: str = self._kept[key]
        return name

    def _bottleneck(self, candidates: Sequence[Layer], shape: Shape) -> str:
        """The last of the coarsest layers before the classifier; one coarser than its stride only pools context."""
        classifier = math.inf
        with contextlib.suppress(NotApplicable):
            classifier = self.layer(self.embedding_at(shape), shape).begins
        strides = {one.name: _stride(one.size, shape) for one in candidates if one.size and one.ends < classifier}
        deep = [name for name, stride in strides.items() if stride <= COARSEST]
        return max(deep, key=strides.__getitem__, default=candidates[0].name)

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
            self._depth, self._structure = 1, None
            try:
                yield
            finally:
                self._depth = 0

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
        return outputs.logits(output, self.spec.output)

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

    @property
    def input_shape(self) -> Shape:
        """(C, H, W) of the model's own inputs. Raises `BadInput` if it is not known."""
        if self.spec.input_size is None:
            raise BadInput("this model's input size is not known; give it: tl.wrap(module, input_size=(3, H, W))")
        return self.spec.input_size

    def _count(self, images: int) -> None:
        self.forwards += images

    def counted(self, values: Tensor) -> Tensor:
        """Values `[N, ...]`, one for each image, of which each gradient that is taken is counted from now on."""
        on_gradient(values, self._count_backward)
        return values

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

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

    @property
    def image(self) -> tuple[int, int]:
        return self.shape[1:]

    def layer(self, name: str) -> Layer:
        return self.handle.layer(name, self.shape)

    def embed(self, image: object, layer: str | None) -> Tensor:
        inputs = self.handle.inputs(image)
        if len(inputs) != 1:
            raise BadInput(f"a reference is one image; got {len(inputs)}")
        names = () if layer is None else (layer,)
        with self.handle.watch(*names, shape=_shape_of(inputs)) as watch:
            return Reading(self.handle, watch, watch(inputs)).embedding(layer)[0]


def pick(reading: Reading, targets: Sequence[Bound], reduce: Reduce = "mean") -> Tensor:
    """Each image's own target, `[N]`: every distinct target is read once for the batch, or for its own images."""
    distinct = list(dict.fromkeys(targets))
    if len(distinct) > 1 and not any(bound.target.reads_output for bound in distinct):
        return reading.handle.counted(_pick_rows(reading, targets, reduce))
    values = torch.stack([bound.read(reading, reduce) for bound in distinct])  # [T, N]
    if len(distinct) == 1:
        return reading.handle.counted(values[0])
    row = {bound: index for index, bound in enumerate(distinct)}
    rows = torch.tensor([row[bound] for bound in targets], device=values.device)
    return reading.handle.counted(values[rows, torch.arange(len(targets), device=values.device)])


@dataclass(frozen=True)
class _Rows:
    """Some images' maps of a reading."""

    maps: Mapping[str, Tensor]

    def map(self, layer: str) -> Tensor:
        return self.maps[layer]

    def _no_output(self, *_: object) -> Any:
        raise NotApplicable("the model's output was not read")

    logits = class_maps = detections = embedding = _no_output


def _pick_rows(reading: Reading, targets: Sequence[Bound], reduce: Reduce) -> Tensor:
    """The same for targets of layers only, read from the maps of their own images.

    A graph through whole maps would write a gradient of their size for each target.
    """
    runs = [(bound, len(list(same))) for bound, same in itertools.groupby(targets)]
    sizes = [size for _, size in runs]
    layers = dict.fromkeys(name for bound, _ in runs for name in bound.target.layers)
    parts = {name: torch.split(reading.map(name), sizes) for name in layers}
    return torch.cat(
        [
            bound.read(_Rows({name: parts[name][place] for name in bound.target.layers}), reduce)
            for place, (bound, _) in enumerate(runs)
        ]
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `DistributedDataParallel` and `torch.compile` wrappers."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _stride(grid: tuple[int, int], shape: Shape) -> float:
    """How many pixels one position of a map stands for, along a side."""
    return math.sqrt(shape[1] * shape[2] / (grid[0] * grid[1]))


def _shape_of(inputs: Tensor) -> Shape:
    return inputs.shape[1], inputs.shape[2], inputs.shape[3]


def _chunks(batch: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, batch[start : start + size]) for start in range(0, len(batch), size))
