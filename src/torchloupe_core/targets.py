"""What is asked about: one grammar for every verb.

    logit:dog   logit:207   prob:dog   margin:dog     the model's output for a class, by name or index
    layer4:17                                         a channel: its mean (or maximum) over positions
    layer4.1.conv2:17@3,5      layer4:17@center       a neuron at row 3, column 5
    layer3                                            a layer: mean square
    layer4:[0.5,-1,2]^2        layer4:[1,0]@3,5       a direction, with the power of the cosine that weighs it
    -layer4:17     0.5*layer4:17+0.5*logit:dog        negation, joint and interpolated targets

`margin:dog` is the logit of dog minus the largest other logit. A class or layer name that holds a character of the
grammar or a space is quoted: `logit:"great white shark"`. `relu#1` is the first call of a module that runs several
times, `fc.in` what goes into one. `str(target)` is canonical and parses back to an equal target.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, SupportsIndex

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, BadTarget, NotApplicable, UnknownName

if TYPE_CHECKING:
    from torchloupe_core.trace import Layer

__all__ = [
    "Bound",
    "Output",
    "Target",
    "TargetLike",
    "Unit",
    "as_targets",
    "channel",
    "direction",
    "interpolate",
    "layer",
    "logit",
    "margin",
    "neuron",
    "parse",
    "prob",
]

Reduce = Literal["mean", "max"]
Position = tuple[int, int] | Literal["center"]

COSINE_FLOOR, NORM_EPSILON = 0.1, 1e-4  # Olah et al. 2017, lucid's direction objective


class Subject(Protocol):
    """What a target is bound to: a model that knows its classes and layers."""

    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def outputs(self) -> int | None: ...
    def layer(self, name: str) -> Layer: ...


class Seen(Protocol):
    """What a forward pass showed."""

    def logits(self) -> Tensor: ...
    def map(self, layer: str) -> Tensor: ...


@dataclass(frozen=True)
class Output:
    """The model's output for one class, by index or name."""

    kind: Literal["logit", "prob", "margin"]
    label: int | str

    def __str__(self) -> str:
        return f"{self.kind}:{self.label if isinstance(self.label, int) else _quoted(self.label, is_class=True)}"

    def bound(self, model: Subject) -> Output:
        return Output(self.kind, _class_index(self.label, model))

    def read(self, seen: Seen, reduce: Reduce) -> Tensor:
        logits, index = seen.logits(), int(self.label)
        if index >= logits.shape[1]:
            raise UnknownName(f"no class {index}; the model has {logits.shape[1]} outputs")
        if self.kind == "prob":
            return logits.softmax(1)[:, index]
        if self.kind == "margin":
            others = torch.cat([logits[:, :index], logits[:, index + 1 :]], 1)
            if not others.shape[1]:
                raise NotApplicable("margin needs at least two classes; this model has one output, use logit:0")
            return logits[:, index] - others.amax(1)
        return logits[:, index]


@dataclass(frozen=True)
class Unit:
    """Something inside the model: a layer, a channel of it, one position of a channel, or a direction."""

    layer: str
    channel: int | None = None
    position: Position | None = None
    direction: tuple[float, ...] | None = None
    power: float = 0.0

    def __str__(self) -> str:
        text = _quoted(self.layer)
        if self.channel is not None:
            text += f":{self.channel}"
        if self.direction is not None:
            text += ":[" + ",".join(map(_number, self.direction)) + "]"
            text += f"^{_number(self.power)}" if self.power else ""
        if self.position is not None:
            text += "@center" if self.position == "center" else "@{},{}".format(*self.position)
        return text

    def bound(self, model: Subject) -> Unit:
        try:
            found = model.layer(self.layer)
        except UnknownName as error:
            if self.layer.isdecimal() or self.layer in (model.classes or ()):
                label = int(self.layer) if self.layer.isdecimal() else self.layer
                raise UnknownName(f"{error}; a class is asked about as {logit(label)}") from None
            raise
        if found.layout is None:
            raise NotApplicable(f"layer {self.layer!r} ({found.kind}) gives no map of channels, so it has no units")
        if self.channel is not None and self.channel >= found.layout.channels:
            raise BadTarget(f"{self}: {self.layer!r} has channels 0 to {found.layout.channels - 1}")
        if self.direction is not None and len(self.direction) != found.layout.channels:
            raise BadTarget(
                f"a direction in {self.layer!r} has {found.layout.channels} numbers, one a channel; "
                f"{len(self.direction)} were given"
            )
        height, width = found.layout.grid
        if isinstance(self.position, tuple) and not (self.position[0] < height and self.position[1] < width):
            raise BadTarget(f"{self}: {self.layer!r} has rows 0 to {height - 1} and columns 0 to {width - 1} here")
        return self

    def read(self, seen: Seen, reduce: Reduce) -> Tensor:
        maps = seen.map(self.layer)  # [N, C, h, w]
        if self.position is not None:
            rows, columns = maps.shape[2:]
            row, column = (rows // 2, columns // 2) if self.position == "center" else self.position
            maps = maps[:, :, row : row + 1, column : column + 1]
        if self.channel is not None:
            unit = maps[:, self.channel]  # [N, h, w]
            return unit.mean((1, 2)) if reduce == "mean" else unit.amax((1, 2))
        if self.direction is not None:
            return self._along(maps, reduce)
        return maps.square().mean((1, 2, 3))

    def _along(self, maps: Tensor, reduce: Reduce) -> Tensor:
        """Dot product with the direction, times max(0.1, cosine) to a power (Olah 2017)."""
        vector = torch.tensor(self.direction, dtype=maps.dtype, device=maps.device)
        dot = torch.einsum("nchw,c->nhw", maps, vector)
        if self.power:
            norms = (maps.square().sum(1) + NORM_EPSILON).sqrt() * (vector.norm() + NORM_EPSILON)
            dot = dot * (dot / norms).clamp(min=COSINE_FLOOR) ** self.power
        return dot.mean((1, 2)) if reduce == "mean" else dot.amax((1, 2))


@dataclass(frozen=True)
class Target:
    """A weighted sum of outputs and units. Add, subtract, negate and scale them like numbers."""

    terms: tuple[tuple[float, Output | Unit], ...]

    def __str__(self) -> str:
        text = ""
        for weight, atom in self.terms:
            sign = "-" if weight < 0 else "+" if text else ""
            text += sign + (f"{_number(abs(weight))}*" if abs(weight) != 1 else "") + str(atom)
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
        return tuple(dict.fromkeys(atom.layer for _, atom in self.terms if isinstance(atom, Unit)))

    @property
    def reads_output(self) -> bool:
        """Whether it reads the model's output; if not, a forward pass may stop at the last of `layers`."""
        return any(isinstance(atom, Output) for _, atom in self.terms)

    def bind(self, model: Subject) -> Bound:
        """Class names become indices; layers, channels and positions are checked against the model."""
        return Bound(self, tuple((weight, atom.bound(model)) for weight, atom in self.terms))


@dataclass(frozen=True)
class Bound:
    """A target checked against one model. `read` gives its value for each image, `[N]`."""

    target: Target
    terms: tuple[tuple[float, Output | Unit], ...]

    def read(self, seen: Seen, reduce: Reduce = "mean") -> Tensor:
        total: Tensor | None = None
        for weight, atom in self.terms:
            value = weight * atom.read(seen, reduce)
            total = value if total is None else total + value
        if total is None:
            raise BadTarget("an empty target asks nothing")
        return total

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


# -- reading the grammar ----------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<weight>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*\*
    | (?P<quoted>"(?:[^"\\]|\\.)*")
    | (?P<vector>\[[^\]]*\])
    | (?P<name>[^\s:@+\-*,"\[\]^]+)
    | (?P<sign>[:@+\-,^*])
    )""",
    re.VERBOSE,
)
_RESERVED = re.compile(r'[\s:@+\-*,"\\\[\]^]')
_OUTPUTS = ("logit", "prob", "margin")


def parse(text: str) -> Target:
    """The target a text stands for. Raises `BadTarget` with a pointer into the text."""
    return _Reader(text).target()


class _Reader:
    """Reads one target text from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.next = text, [], 0  # type: str, list[tuple[str, str, int]], int
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                start = position + len(text[position:]) - len(text[position:].lstrip())
                raise BadTarget.at(text, start, f"{text[start]!r} is not closed or has no place here")
            kind = match.lastgroup or ""
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()

    def target(self) -> Target:
        terms = [self.term(first=True)]
        while self.next < len(self.tokens):
            terms.append(self.term(first=False))
        return Target(tuple(terms))

    def term(self, *, first: bool) -> tuple[float, Output | Unit]:
        weight = 1.0
        if self.sees("+") or self.sees("-"):
            weight = -1.0 if self.take()[1] == "-" else 1.0
        elif not first:
            raise self.problem("expected '+', '-' or the end; a name with a space or sign in it is quoted")
        if self.kind() == "weight":
            weight *= float(self.take()[1])
        return weight, self.atom()

    def atom(self) -> Output | Unit:
        quoted = self.kind() == "quoted"
        name = self.name("a layer, or logit:, prob: or margin:")
        if not quoted and name in _OUTPUTS:
            if not self.sees(":"):
                raise self.problem(f"expected ':' and a class after {name!r}")
            self.take()
            return self.output(name)
        return self.unit(name)

    def output(self, kind: str) -> Output:
        by_name = self.kind() == "quoted"
        label = self.name("a class name or index")
        known: Literal["logit", "prob", "margin"] = (
            "prob" if kind == "prob" else "margin" if kind == "margin" else "logit"
        )
        return Output(known, int(label) if label.isdecimal() and not by_name else label)

    def unit(self, name: str) -> Unit:
        channel, vector, power, position = None, None, 0.0, None
        if self.sees(":"):
            self.take()
            if self.kind() == "vector":
                vector, power = self.vector()
            else:
                channel = self.integer("a channel number")
        if self.sees("@"):
            if channel is None and vector is None:
                raise self.problem("a position belongs to a channel, as in layer:channel@row,column; found it")
            self.take()
            position = self.position()
        return Unit(name, channel, position, vector, power)

    def vector(self) -> tuple[tuple[float, ...], float]:
        _, text, at = self.take()
        try:
            values = tuple(float(value) for value in text[1:-1].split(","))
        except ValueError:
            raise BadTarget.at(self.text, at, "a direction is numbers separated by commas") from None
        if not all(map(math.isfinite, values)):
            raise BadTarget.at(self.text, at, "a direction is finite numbers")
        if not self.sees("^"):
            return values, 0.0
        self.take()
        try:
            return values, float(self.name("the power of the cosine"))
        except ValueError:
            raise self.problem("the power of the cosine is a number; found it before") from None

    def position(self) -> Position:
        if self.kind() == "name" and self.tokens[self.next][1] in ("center", "centre"):
            self.take()
            return "center"
        row = self.integer("a row number or 'center'")
        if not self.sees(","):
            raise self.problem("expected ',' and a column number")
        self.take()
        return row, self.integer("a column number")

    def name(self, what: str) -> str:
        if self.kind() not in ("name", "quoted"):
            raise self.problem(f"expected {what}")
        kind, text, _ = self.take()
        return re.sub(r"\\(.)", r"\1", text[1:-1]) if kind == "quoted" else text

    def integer(self, what: str) -> int:
        if self.kind() != "name" or not self.tokens[self.next][1].isdecimal():
            raise self.problem(f"expected {what}")
        return int(self.take()[1])

    def kind(self) -> str:
        return self.tokens[self.next][0] if self.next < len(self.tokens) else "end"

    def sees(self, sign: str) -> bool:
        return self.next < len(self.tokens) and self.tokens[self.next][:2] == ("sign", sign)

    def take(self) -> tuple[str, str, int]:
        self.next += 1
        return self.tokens[self.next - 1]

    def problem(self, expected: str) -> BadTarget:
        if self.next < len(self.tokens):
            _, found, at = self.tokens[self.next]
            return BadTarget.at(self.text, at, f"{expected}, found {found!r}")
        return BadTarget.at(self.text, len(self.text), f"{expected}, found the end")


# -- small parts ------------------------------------------------------------------------------------------------------


def _one(atom: Output | Unit) -> Target:
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


def _class_index(label: int | str, model: Subject) -> int:
    if isinstance(label, int):
        if model.outputs is not None and label >= model.outputs:
            raise UnknownName(f"no class {label}; the model has {model.outputs} outputs, 0 to {model.outputs - 1}")
        return label
    if model.classes is None:
        raise UnknownName(f"no class {label!r}: this model's classes have no names; give an index, or classes=")
    for fold in (str, str.lower):
        hits = [index for index, name in enumerate(model.classes) if fold(name) == fold(label)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise UnknownName(f"class {label!r} is {len(hits)} classes, {hits}; give the index")
    raise UnknownName.of("class", label, model.classes)


def _quoted(name: str, *, is_class: bool = False) -> str:
    plain = name and not _RESERVED.search(name) and not (name.isdecimal() if is_class else name in _OUTPUTS)
    return name if plain else '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
