"""One question about one batch of images, as a method sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle, Reading, Shape, pick
from torchloupe_core.pace import Pace, out_of_memory
from torchloupe_core.shared import Shared
from torchloupe_core.targets import Bound

__all__ = ["Map", "Query", "finite"]

S = TypeVar("S")
T = TypeVar("T")


@dataclass
class Map:
    """What a method found: `values [N, h, w]`, and what more it knows.

    per_channel: `[N, C, H, W]`, the share of each input channel, where the method gives one. layer: the layer it read.
    scores: the target's value for each image `[N]`, where the method came by it; it saves a forward pass.
    diagnostics: numbers a user needs to judge the map, as `completeness_gap`; a list holds one entry for each image.
    standard_error: of the values, `[N, h, w]`, where the method samples. outputs: the model's output for each image and
    its variants, `[N, 1 + n, K]`, where the method keeps them.
    """

    values: Tensor
    per_channel: Tensor | None = None
    layer: str | None = None
    scores: Tensor | None = None
    standard_error: Tensor | None = None
    outputs: Tensor | None = None
    diagnostics: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Query:
    """Inputs `[N, C, H, W]`, one bound target each, and the means to evaluate them. The model is already borrowed.

    `progress(done, total)` is told of the images sent through the model by methods that take long. shared: where what
    other methods do as well is kept, in a comparison.
    """

    handle: Handle
    inputs: Tensor
    targets: Sequence[Bound]
    seed: int = 0
    layer: str | None = None
    batch_size: int | None = None
    progress: Callable[[int, int], None] = lambda done, total: None
    shared: Shared | None = None
    pace: Pace = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            self.pace = Pace(self.batch_size, settled=True)
        else:
            self.pace = self.handle.pace(self.shape)

    @property
    def shape(self) -> Shape:
        """(C, H, W) of the inputs."""
        return self.inputs.shape[1], self.inputs.shape[2], self.inputs.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the inputs."""
        return self.shape[1], self.shape[2]

    @property
    def batch(self) -> int:
        """How many images go through the model at once."""
        return self.pace.size

    def generator(self) -> torch.Generator:
        """A fresh random source on the CPU, the same for the same seed."""
        return torch.Generator().manual_seed(self.seed)

    def each(self, answer: Callable[[Query], T]) -> list[T]:
        """What `answer` says of this query, batch by batch."""
        answers: list[T] = []
        for _, done, one in self.pace.run(len(self.inputs), lambda start, stop: answer(self.only(start, stop))):
            answers.append(one)
            self.progress(done, len(self.inputs))
        return answers

    def each_of(self, what: Hashable, work: Callable[[Query], S], answer: Callable[[S], T]) -> list[T]:
        """What `answer` makes of what `work` gives of this query, batch by batch.

        what: names the work among those that methods share; what it gives is not written to.
        """
        if self.shared is None:
            return self.each(lambda part: answer(work(part)))
        return [answer(one) for one in self.once(what, self.inputs, lambda: self.each(work))]

    def once(self, what: Hashable, inputs: Tensor, do: Callable[[], T]) -> T:
        """What `do` gives, which depends on the targets, `what` and `inputs` alone; done once where it is shared."""
        if self.shared is None:
            return do()
        return self.shared.once(self.handle, (what, tuple(self.targets)), inputs, do)

    def only(self, start: int, stop: int) -> Query:
        """The query about some of the images."""
        part = copy.copy(self)
        part.inputs, part.targets = self.inputs[start:stop], self.targets[start:stop]
        return part

    def score(self, inputs: Tensor, images: Tensor | Sequence[int] | None = None) -> Tensor:
        """Each input's target, `[n]`, from one forward pass; differentiable where gradients are on.

        images: for each input the index of the image it is a variant of; without it `inputs` are all images in order.
        """
        chosen = range(len(self.targets)) if images is None else torch.as_tensor(images).tolist()
        return finite(self._read(inputs, [self.targets[index] for index in chosen]))

    def outputs(self, inputs: Tensor) -> Tensor:
        """The model's output for each input, `[n, K]`, from one forward pass."""
        with self.handle.watch(shape=self.shape) as watch:
            return self.handle.logits(watch(inputs))

    def _read(self, inputs: Tensor, targets: Sequence[Bound]) -> Tensor:
        """The targets' values; without a graph to hold together, in halves if the memory does not suffice."""
        try:
            return self.handle.read(inputs, targets)
        except (RuntimeError, MemoryError) as error:
            if torch.is_grad_enabled() or len(inputs) == 1 or not out_of_memory(error):
                raise
        while self.pace.size >= len(inputs):  # out of the except clause, whose traceback holds on to tensors
            self.pace.halve()
        half = len(inputs) // 2
        return torch.cat([self._read(inputs[:half], targets[:half]), self._read(inputs[half:], targets[half:])])

    def resolved_layer(self) -> str:
        """The layer asked for, or the default: the last spatial one that the target depends on."""
        inner = [self.handle.layer(name, self.shape) for bound in self.targets for name in bound.target.layers]
        first = min(inner, key=lambda layer: layer.begins) if inner else None
        if self.layer is None:
            return self.handle.features_at(self.shape, first.name if first else None)
        chosen = self.handle.layer(self.layer, self.shape)
        if not chosen.spatial:
            size = "one position" if chosen.layout else "no map"
            raise NotApplicable(
                f"layer {self.layer!r} ({chosen.kind}) has {size}, so it cannot say where; "
                f"a spatial one is {self.handle.features_at(self.shape)!r}"
            )
        if first is not None and chosen.ends > first.ends:
            raise NotApplicable(
                f"the target reads {first.name!r}, which comes before layer {self.layer!r} and does not depend on it"
            )
        return self.layer

    def with_leaf(self, layer: str) -> tuple[Tensor, Tensor, Reading]:
        """One forward pass whose graph begins at `layer`: the scores `[N]`, the layer's raw tensor, what was read."""
        names = dict.fromkeys(name for bound in self.targets for name in bound.target.layers)
        through = any(bound.target.reads_output for bound in self.targets)
        with self.handle.watch(*names, leaf=layer, through=through, shape=self.shape) as watch:
            output = watch(self.inputs)
            reading = Reading(self.handle, watch, output)
            with torch.enable_grad():
                scores = pick(reading, self.targets)
        return finite(scores), watch[layer], reading


def finite(scores: Tensor) -> Tensor:
    """The scores as they are. Raises `BadInput` if one is NaN or infinite."""
    if not scores.detach().isfinite().all():
        raise BadInput("the model's output holds NaN or infinity for this input, so there is nothing to explain")
    return scores
