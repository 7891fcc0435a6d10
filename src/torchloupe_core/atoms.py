"""What one term of a target asks: `Output`, the model's output for a class, and `Unit`, something inside the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from torchloupe_core.errors import BadTarget, NotApplicable, UnknownName

if TYPE_CHECKING:
    from torchloupe_core.layout import Grid
    from torchloupe_core.outputs import Detections
    from torchloupe_core.trace import Layer

__all__ = [
    "CLASS_HEADS",
    "HEADS",
    "Atom",
    "ClassHead",
    "Output",
    "Position",
    "Reduce",
    "Seen",
    "Subject",
    "Unit",
    "class_index",
    "class_text",
    "number",
    "quoted",
]

ClassHead = Literal["logit", "prob", "sigmoid", "margin"]
CLASS_HEADS: tuple[ClassHead, ...] = ("logit", "prob", "sigmoid", "margin")
HEADS = (*CLASS_HEADS, "region", "box_score", "similarity")  # words that begin an atom; such a layer is quoted
Reduce = Literal["mean", "max"]
Position = tuple[int, int] | Literal["center"]

_RESERVED = re.compile(r'[\s:@+\-*,"\\\[\]^]')
COSINE_FLOOR, NORM_EPSILON = 0.1, 1e-4  # Olah et al. 2017, lucid's direction objective


class Subject(Protocol):
    """What a target is bound to: a model that knows its classes and layers, at one input size `image` (H, W).

    `embed` gives the embedding `[D]` of another image, at a layer or at the output.
    """

    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def outputs(self) -> int | None: ...
    @property
    def image(self) -> Grid: ...
    def layer(self, name: str) -> Layer: ...
    def embed(self, image: object, layer: str | None) -> Tensor: ...


class Seen(Protocol):
    """What a forward pass showed: its output as one of its forms (`outputs`), and layers as `[N, C, h, w]`."""

    def logits(self) -> Tensor: ...
    def class_maps(self) -> Tensor: ...
    def detections(self) -> Detections: ...
    def embedding(self, layer: str | None) -> Tensor: ...
    def map(self, layer: str) -> Tensor: ...


class Atom:
    """One term of a target: hashable, and `str` of it is its canonical text."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers it reads."""
        return ()

    @property
    def reads_output(self) -> bool:
        """Whether it reads the model's output."""
        return True

    def bound(self, model: Subject) -> Atom:
        """Itself with names as indices, checked against a model."""
        raise NotImplementedError

    def read(self, seen: Seen, reduce: Reduce) -> Tensor:
        """Its value for each image, `[N]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Output(Atom):
    """The model's output for one class, by index or name."""

    kind: ClassHead
    label: int | str

    def __str__(self) -> str:
        return f"{self.kind}:{class_text(self.label)}"

    def bound(self, model: Subject) -> Output:
        return Output(self.kind, class_index(self.label, model))

    def read(self, seen: Seen, reduce: Reduce) -> Tensor:
        logits, index = seen.logits(), int(self.label)
        if index >= logits.shape[1]:
            raise UnknownName(f"no class {index}; the model has {logits.shape[1]} outputs")
        if self.kind == "prob":
            return logits.softmax(1)[:, index]
        if self.kind == "sigmoid":
            return logits[:, index].sigmoid()
        if self.kind == "margin":
            others = torch.cat([logits[:, :index], logits[:, index + 1 :]], 1)
            if not others.shape[1]:
                raise NotApplicable("margin needs at least two classes; this model has one output, use logit:0")
            return logits[:, index] - others.amax(1)
        return logits[:, index]


@dataclass(frozen=True)
class Unit(Atom):
    """Something inside the model: a layer, a channel of it, one position of a channel, or a direction."""

    layer: str
    channel: int | None = None
    position: Position | None = None
    direction: tuple[float, ...] | None = None
    power: float = 0.0

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer,)

    @property
    def reads_output(self) -> bool:
        return False

    def __str__(self) -> str:
        text = quoted(self.layer)
        if self.channel is not None:
            text += f":{self.channel}"
        if self.direction is not None:
            text += ":[" + ",".join(map(number, self.direction)) + "]"
            text += f"^{number(self.power)}" if self.power else ""
        if self.position is not None:
            text += "@center" if self.position == "center" else "@{},{}".format(*self.position)
        return text

    def bound(self, model: Subject) -> Unit:
        try:
            found = model.layer(self.layer)
        except UnknownName as error:
            if self.layer.isdecimal() or self.layer in (model.classes or ()):
                label = int(self.layer) if self.layer.isdecimal() else self.layer
                raise UnknownName(f"{error}; a class is asked about as {Output('logit', label)}") from None
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
        self.place(*found.layout.grid)
        return self

    def read(self, seen: Seen, reduce: Reduce) -> Tensor:
        values = self.map(seen.map(self.layer))
        return values.mean((1, 2)) if reduce == "mean" else values.amax((1, 2))

    def map(self, maps: Tensor) -> Tensor:
        """Its value at each position of its layer's maps `[N, C, h, w]`, `[N, h, w]`; `[N, 1, 1]` if it has but one."""
        if self.position is not None:
            row, column = self.place(maps.shape[2], maps.shape[3])
            maps = maps[:, :, row : row + 1, column : column + 1]
        if self.channel is not None:
            return maps[:, self.channel]
        if self.direction is not None:
            return self._along(maps)
        return maps.square().mean((1, 2, 3))[:, None, None]

    def place(self, height: int, width: int) -> tuple[int, int]:
        """Where it is in a map of that size, if it has a position. Raises `BadTarget` where the map is too small."""
        row, column = self.position if isinstance(self.position, tuple) else (height // 2, width // 2)
        if row >= height or column >= width:
            raise BadTarget(f"{self}: {self.layer!r} has rows 0 to {height - 1} and columns 0 to {width - 1} here")
        return row, column

    def _along(self, maps: Tensor) -> Tensor:
        """Dot product with the direction, times max(0.1, cosine) to a power (Olah 2017)."""
        vector = torch.tensor(self.direction, dtype=maps.dtype, device=maps.device)
        dot = torch.einsum("nchw,c->nhw", maps, vector)
        if self.power:
            norms = (maps.square().sum(1) + NORM_EPSILON).sqrt() * (vector.norm() + NORM_EPSILON)
            dot = dot * (dot / norms).clamp(min=COSINE_FLOOR) ** self.power
        return dot


def class_index(label: int | str, model: Subject) -> int:
    """The index of a class given by name or index. Raises `UnknownName` with the nearest names."""
    if isinstance(label, int):
        known = len(model.classes) if model.outputs is None and model.classes else model.outputs
        if known is not None and label >= known:
            raise UnknownName(f"no class {label}; the model has {known} outputs, 0 to {known - 1}")
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


def class_text(label: int | str) -> str:
    """A class as the grammar reads it; a name of digits is quoted, an index is not."""
    return str(label) if isinstance(label, int) else quoted(label, is_class=True)


def quoted(name: str, *, is_class: bool = False, always: bool = False) -> str:
    """A name as the grammar reads it, in quotes where it needs them."""
    plain = name and not always and not _RESERVED.search(name) and not (name.isdecimal() if is_class else name in HEADS)
    return name if plain else '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def number(value: float) -> str:
    """A number, without a decimal point where it is whole."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
