"""What is asked about: one grammar for every verb.

    logit:dog   logit:207   prob:dog   margin:dog     the model's output for a class, by name or index
    sigmoid:dog                                       its probability by itself, where several classes may be there
    region:dog  region:dog@10,20,50,60                a class in a segmentation: its mean logit, in all or in a box
    box_score:dog@10,20,50,60                         a detected object: the score of what fits the box
    similarity:"ref.jpg"       similarity:[1,0]@fc.in the cosine with an image's embedding, or with a vector
    layer4:17                                         a channel: its mean (or maximum) over positions
    layer4.1.conv2:17@3,5      layer4:17@center       a neuron at row 3, column 5
    layer3                                            a layer: mean square
    layer4:[0.5,-1,2]^2        layer4:[1,0]@3,5       a direction, with the power of the cosine that weighs it
    -layer4:17     0.5*layer4:17+0.5*logit:dog        negation, joint and interpolated targets

`margin:dog` is the logit of dog minus the largest other logit. A class or layer name that holds a character of the
grammar or a space is quoted: `logit:"great white shark"`. `relu#1` is the first call of a module that runs several
times, `fc.in` what goes into one. A box is top,left,bottom,right in pixels of the model's input. `str(target)` is
canonical and parses back to an equal target, save that of `similarity` to an image in memory, which it only names.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from torchloupe_core import grammar
from torchloupe_core.atoms import Atom, Output, Position, Reduce, Seen, Subject, Unit, number
from torchloupe_core.errors import BadInput, BadTarget
from torchloupe_core.regions import DEFAULT_IOU, BoxScore, Region, as_box, as_place
from torchloupe_core.similarity import Similarity, as_reference

__all__ = [
    "Bound",
    "Output",
    "Reduce",
    "Target",
    "TargetLike",
    "Unit",
    "as_targets",
    "box_score",
    "channel",
    "direction",
    "interpolate",
    "layer",
    "logit",
    "margin",
    "neuron",
    "parse",
    "prob",
    "region",
    "sigmoid",
    "similarity",
]


@dataclass(frozen=True)
class Target:
    """A weighted sum of outputs and units. Add, subtract, negate and scale them like numbers."""

    terms: tuple[tuple[float, Atom], ...]

    def __str__(self) -> str:
        text = ""
        for weight, atom in self.terms:
            sign = "-" if weight < 0 else "+" if text else ""
            text += sign + (f"{number(abs(weight))}*" if abs(weight) != 1 else "") + str(atom)
        return text

    def __add__(self, other: Target) -> Target:
        return Target(self.terms + other.terms) if isinstance(other, Target) else NotImplemented

    def __mul__(self, factor: float) -> Target:
        if isinstance(factor, Target):
            return NotImplemented
        factor = float(factor)
        if not math.isfinite(factor):
            raise BadTarget(f"a target's weight is a finite number; got {factor}")
        return Target(tuple((weight * factor, atom) for weight, atom in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Target:
        return self * -1

    def __sub__(self, other: Target) -> Target:
        return self + -other if isinstance(other, Target) else NotImplemented

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers it reads, each once."""
        return tuple(dict.fromkeys(name for _, atom in self.terms for name in atom.layers))

    @property
    def reads_output(self) -> bool:
        """Whether it reads the model's output; if not, a forward pass may stop at the last of `layers`."""
        return any(atom.reads_output for _, atom in self.terms)

    def bind(self, model: Subject) -> Bound:
        """Class names become indices; layers, channels and positions are checked against the model."""
        return Bound(self, tuple((weight, atom.bound(model)) for weight, atom in self.terms))


@dataclass(frozen=True)
class Bound:
    """A target checked against one model."""

    target: Target
    terms: tuple[tuple[float, Atom], ...]

    def read(self, seen: Seen, reduce: Reduce = "mean") -> Tensor:
        """Its value for each image, `[N]`.

        With "max" the terms of each layer are added position by position, and the largest sum of each layer counts.
        """
        if not self.terms:
            raise BadTarget("an empty target asks nothing")
        if reduce == "mean":
            return _sum([weight * atom.read(seen, reduce) for weight, atom in self.terms])
        rest = [weight * atom.read(seen, reduce) for weight, atom in self.terms if not isinstance(atom, Unit)]
        units = [self.map(layer, seen.map(layer)).amax((1, 2)) for layer in self._unit_layers]
        return _sum([*units, *rest])

    def map(self, layer: str, maps: Tensor) -> Tensor:
        """The sum of its units of a layer at each position of the maps `[N, C, h, w]`: `[N, h, w]` or `[N, 1, 1]`."""
        return _sum([w * unit.map(maps) for w, unit in self.terms if isinstance(unit, Unit) and unit.layer == layer])

    @property
    def _unit_layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(unit.layer for _, unit in self.terms if isinstance(unit, Unit)))

    @property
    def detects(self) -> bool:
        """Whether it asks about detected objects and nothing else, so that it is 0 where none is there."""
        return all(isinstance(atom, BoxScore) for _, atom in self.terms)

    @property
    def logit_weights(self) -> dict[int, float] | None:
        """Weight per class if this is a sum of logits and nothing else, else None."""
        weights: dict[int, float] = {}
        for weight, atom in self.terms:
            if not isinstance(atom, Output) or atom.kind != "logit":
                return None
            weights[int(atom.label)] = weights.get(int(atom.label), 0.0) + weight
        return weights


TargetLike = Target | str | int


def logit(label: str | int) -> Target:
    """The logit of a class."""
    return _one(Output("logit", _label(label)))


def prob(label: str | int) -> Target:
    """The softmax probability of a class."""
    return _one(Output("prob", _label(label)))


def margin(label: str | int, other: str | int | None = None) -> Target:
    """The logit of a class minus that of another, or minus the largest other logit."""
    return _one(Output("margin", _label(label))) if other is None else logit(label) - logit(other)


def sigmoid(label: str | int) -> Target:
    """The sigmoid of a class's logit: its probability in a model of independent classes."""
    return _one(Output("sigmoid", _label(label)))


def region(label: str | int, where: Any = None) -> Target:
    """The mean logit of a class over a region, for outputs `[N, K, H, W]`, as in semantic segmentation.

    where: a bool mask `[H, W]`, a box **(top, left, bottom, right)** in pixels of the model's input, or None for all
    positions. Where the output is smaller than the image, each of its positions counts by its share in the region. A
    mask has the size of the image or of the output. To look at what was predicted, give that as mask:
    `tl.region("dog", prediction == dog)` (Vinogradova et al. 2020, Towards Interpretable Semantic Segmentation).
    """
    return _one(Region(_label(label), as_place(where)))


def box_score(label: str | int, box: Sequence[float] | Tensor, iou: float = DEFAULT_IOU) -> Target:
    """Of a detector: the largest IoU times score among the detections of a class that overlap a box by at least `iou`.

    box: **(top, left, bottom, right)** in pixels of the model's input; detectors' own boxes are (left, top, ...). Where
    nothing fits, the value is 0 and so is its gradient. With iou=0 this is the similarity of D-RISE (Petsiuk et al.
    2021, Black-box Explanation of Object Detectors via Saliency Maps) where its class vectors are one-hot. The
    gradient is the score's, weighted by the overlap, which counts as a constant; in two-stage models torchvision's
    proposals count as constant too.
    """
    return _one(BoxScore(_label(label), as_box(box), float(iou)))


def similarity(reference: Any, layer: object = None) -> Target:
    """The cosine of each image's embedding with that of a reference image.

    reference: an image as `explain` takes it, or an embedding `[D]`. layer: where the embedding is read, its map
    averaged over positions, as `model.embedding` of a classifier; without it the model's output `[N, D]`. Zeros are
    similar to nothing, 0. A path or an embedding is in the target's text; an image in memory is only named there, by
    a digest of its pixels, `similarity:image#...`, and that text cannot be read back.
    """
    return _one(Similarity(as_reference(reference), None if layer is None else str(layer)))


def layer(name: object) -> Target:
    """A whole layer: mean of the squared activations (the DeepDream objective)."""
    return _one(Unit(str(name)))


def channel(layer: object, index: SupportsIndex) -> Target:
    """A channel of a layer: its mean over positions, or its maximum in a data set search."""
    return _one(Unit(str(layer), _index(index, "channel")))


def neuron(
    layer: object, index: SupportsIndex, row: SupportsIndex | None = None, column: SupportsIndex | None = None
) -> Target:
    """A channel of a layer at one position; without a position, the centre."""
    if (row is None) != (column is None):
        raise BadTarget("a neuron's position is a row and a column, or neither for the centre")
    position: Position = "center"
    if row is not None and column is not None:
        position = (_index(row, "row"), _index(column, "column"))
    return _one(Unit(str(layer), _index(index, "channel"), position))


def direction(layer: object, vector: Tensor | Sequence[float], *, power: float = 0.0) -> Target:
    """A direction among a layer's channels: dot product times max(0.1, cosine) ** power; power 0 is the plain dot."""
    values = torch.as_tensor(vector, dtype=torch.float64).detach().cpu()
    if values.ndim != 1 or not values.isfinite().all():
        raise BadTarget(f"a direction is a row of finite numbers, one a channel; got shape {tuple(values.shape)}")
    return _one(Unit(str(layer), direction=tuple(values.tolist()), power=float(power)))


def interpolate(a: TargetLike, b: TargetLike, n: int) -> list[Target]:
    """n targets from `a` to `b` in equal steps, both ends included."""
    if n < 2:
        raise BadInput(f"interpolate needs n of at least 2, both ends included; got {n}")
    first, last = as_target(a), as_target(b)
    return [first, *(first * (1 - i / (n - 1)) + last * (i / (n - 1)) for i in range(1, n - 1)), last]


def parse(text: str) -> Target:
    """The target a text stands for. Raises `BadTarget` with a pointer into the text."""
    return Target(grammar.read(text))


def as_target(target: TargetLike) -> Target:
    """A target from a target, a text, or a class index."""
    if isinstance(target, Target):
        return target
    if isinstance(target, str):
        return parse(target)
    try:
        return logit(target)
    except TypeError:
        raise BadTarget(f"a target is a text, a tl.Target or a class index; got {type(target).__name__}") from None


def as_targets(target: TargetLike | Sequence[TargetLike] | Tensor, n: int) -> list[Target]:
    """One target for each of n images: one given applies to all, a list gives one each."""
    if isinstance(target, Tensor):
        target = target.tolist()
    if not isinstance(target, Sequence) or isinstance(target, str):
        return [as_target(target)] * n
    if len(target) != n:
        raise BadInput(f"{len(target)} targets for {n} images; give one for all or one for each")
    return [as_target(one) for one in target]


def _sum(values: Sequence[Tensor]) -> Tensor:
    return functools.reduce(operator.add, values)


def _one(atom: Atom) -> Target:
    return Target(((1.0, atom),))


def _label(label: str | SupportsIndex) -> str | int:
    return label if isinstance(label, str) else _index(label, "class")


def _index(value: SupportsIndex, what: str) -> int:
    if isinstance(value, bool):
        raise BadTarget(f"a {what} is a number, not {value}")
    index = operator.index(value)
    if index < 0:
        raise BadTarget(f"a {what} is counted from 0; got {index}")
    return index
