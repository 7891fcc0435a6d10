"""One method's maps, as a metric sees them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from torchloupe_core.atoms import Output
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.query import Query
from torchloupe_core.registry import Method
from torchloupe_core.targets import Target, prob

__all__ = ["FEW", "Again", "Case", "as_probability", "of_first"]

FEW = 16  # images, of metrics that ask each method anew several times; the others have no value


class Again(Protocol):
    """The method asked once more, everything else as before: its maps `[n, H, W]`.

    inputs: variants of some of the images, those at `images`, in order.
    """

    def __call__(
        self, inputs: Tensor, images: list[int], *, handle: Handle | None = None, seed: int | None = None
    ) -> Tensor: ...


@dataclass
class Case:
    """A method's maps of a query's images, and what it takes to judge them. A metric is `f(case, *, options) -> [N]`.

    query: the images; its targets are what is scored, probabilities where logits were explained. explained: the same
    with what was explained, if that is something else. maps: `[N, H, W]`, raw, at the images' resolution. attributed:
    `[N, C, H, W]`, the shares of input channels where the method gives them. method: None for a baseline, which no
    model has a part in; again: the method once more. masks: `[N, H, W]` bool, where the truth is. shared: where metrics
    keep what they need for every method. place: of the first of these images in the whole comparison.

    NaN in an answer says that the metric has nothing to say of that image.
    """

    query: Query
    maps: Tensor
    method: Method | None = None
    attributed: Tensor | None = None
    again: Again | None = None
    explained: Query | None = None
    masks: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)
    place: int = 0

    def __len__(self) -> int:
        return len(self.maps)

    def only(self, start: int, stop: int) -> Case:
        """The case of some of the images."""
        some, again = slice(start, stop), self.again
        return replace(
            self,
            query=self.query.only(start, stop),
            maps=self.maps[some],
            attributed=None if self.attributed is None else self.attributed[some],
            again=None
            if again is None
            else lambda inputs, images, **more: again(inputs, [start + one for one in images], **more),
            explained=None if self.explained is None else self.explained.only(start, stop),
            masks=None if self.masks is None else self.masks[some],
            shared={},
            place=self.place + start,
        )

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made once for all methods of a comparison."""
        if key not in self.shared:
            self.shared[key] = make()
        found: Tensor = self.shared[key]
        return found

    def scores(self) -> Tensor:
        """The value of each image's target, `[N]`."""
        return self.once("scores", lambda: self.score_variants(self.query.inputs))

    @property
    def asked(self) -> Query:
        """The images with what was explained."""
        return self.query if self.explained is None else self.explained

    def score_variants(self, inputs: Tensor) -> Tensor:
        """The targets' values for one variant of each image, `[N]`, in batches."""
        return _values(self.query, inputs)

    def value_variants(self, inputs: Tensor) -> Tensor:
        """The same of what was explained."""
        return _values(self.asked, inputs)

    @functools.cached_property
    def seen_through(self) -> Tensor:
        """The targets' values for inputs times their map, scaled to [0, 1], `[N]`."""
        flat = self.maps.flatten(1)
        low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
        shown = ((self.maps - low) / (high - low).where(high > low, 1.0))[:, None]
        return self.score_variants(self.query.inputs * shown.to(self.query.inputs))

    def truth(self) -> Tensor:
        """The masks. Raises `NotApplicable` where there are none."""
        if self.masks is None:
            raise NotApplicable("this metric needs masks=, where the object is")
        return self.masks


def _values(query: Query, inputs: Tensor) -> Tensor:
    return torch.cat(replace(query, inputs=inputs).each(lambda part: part.score(part.inputs))).float().cpu()


def of_first(case: Case, images: int, judge: Callable[[Case, Again], Tensor]) -> Tensor:
    """`[N]`: what `judge` says of the case of the first images of the whole comparison, NaN for the others.

    Raises `NotApplicable` for a baseline, which cannot be asked again.
    """
    if images < 1:
        raise BadInput(f"images is how many are asked again, at least 1; got {images}")
    if case.again is None:
        raise NotApplicable("a baseline has no part in the model, so there is nothing to ask again")
    count = max(0, min(images - case.place, len(case)))
    found = torch.full((len(case),), torch.nan)
    if count:
        found[:count] = judge(case.only(0, count), case.again)
    return found


def as_probability(target: Target) -> Target:
    """The probability of a class in place of its logit; any other target as it is.

    Insertion and deletion are published for probabilities, and a sum of logits has no scale of its own.
    """
    if len(target.terms) == 1:
        weight, atom = target.terms[0]
        if weight == 1 and isinstance(atom, Output) and atom.kind == "logit":
            return prob(atom.label)
    return target
