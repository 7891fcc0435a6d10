"""Quantus, asked about a case: what it is given for images, a model and a method.

Quantus hands arrays to a module and to a function that explains. Both are answered out of the case: the module gives
the value of each image's target, whatever that is, and the function asks the method again, so that the user's model is
run as by any other metric. Quantus is given all images of a case at once, whatever goes through the model together.

It is under the LGPL and installed by users alone.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchloupe_core.baselines import Baseline, filling
from torchloupe_core.borrow import kept_randomness
from torchloupe_core.errors import BadInput, LoupeError, MissingDependency, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.metrics.case import Case

__all__ = [
    "Sight",
    "asked_again",
    "covered",
    "evaluated",
    "library",
    "numbers",
    "seen",
    "to_peak",
    "values_of",
]

# What Quantus raises where it can make nothing of maps, masks or an option; a module's own errors are told apart.
FOREIGN = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)

Again = Callable[[Tensor, list[int], Handle | None], Tensor]


@dataclass
class Sight:
    """What Quantus takes for the images, `[N, c, h, w]`, and the model's answer to what it makes of them, `[N, K]`."""

    shown: Tensor
    answer: Callable[[Tensor], Tensor]


def seen(case: Case) -> Sight:
    """The images as the model gets them."""
    return Sight(case.query.inputs, lambda x: case.score_variants(x.to(case.query.inputs))[:, None])


def covered(
    case: Case, baseline: Baseline = 0.0, *, patch: int = 1, fill: Callable[[Tensor], Tensor] | None = None
) -> Sight:
    """A picture of ones, `[N, 1, H, W]`: where Quantus puts less, the baseline stands in for the pixel, all channels.

    patch: squares of so many pixels are one. fill: makes the images of such a picture `[N, 1, H, W]` instead.
    """
    height, width = case.query.size
    if patch < 1 or height % patch or width % patch:
        raise BadInput(f"squares of {patch} pixels do not fill images of {height} x {width}")
    inputs = case.query.inputs
    place = filling(case.query, baseline)
    images = fill or (lambda cover: torch.where(cover < 1, place, inputs))

    def answer(x: Tensor) -> Tensor:
        cover = x.to(inputs.device).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        return case.score_variants(images(cover).to(inputs.dtype))[:, None]

    return Sight(torch.ones(len(case), 1, height // patch, width // patch), answer)


def values_of(case: Case, inputs: Tensor) -> Tensor:
    """The model's outputs for one variant of each image, `[N, K]`, in batches."""
    query = replace(case.query, inputs=inputs.to(case.query.inputs))
    return torch.cat(query.each(lambda part: part.outputs(part.inputs))).float().cpu()


def asked_again(case: Case, form: Callable[[Tensor], Tensor] = lambda maps: maps) -> Again:
    """The method asked about variants of all images in order. Raises `NotApplicable` for a baseline."""
    again = case.again
    if again is None:
        raise NotApplicable("a baseline has no part in the model, so there is nothing to ask again")
    return lambda inputs, _, handle: form(again(inputs, list(range(len(inputs))), handle=handle))


def evaluated(
    case: Case,
    kind: str,
    sight: Sight,
    maps: Tensor,
    *,
    classes: Sequence[int] | None = None,
    again: Again | None = None,
    layers: bool = False,
    **options: Any,
) -> Any:
    """What Quantus' metric `kind` says of maps `[N, h, w]`, as it returns it, one entry for each image.

    classes: of the targets, where the answer has several columns, the first otherwise. again: maps of other inputs, for
    classes, by a copy of the model. layers: Quantus sees the model's layers, and draws those of its own copy anew.
    options: of the metric. Quantus neither scales maps nor takes magnitudes. Raises `MissingDependency`, and
    `NotApplicable` with what Quantus has against the maps.
    """
    metrics, seed = library(), case.query.seed
    question = _Question(sight, _double(maps), np.array(classes or [0] * len(maps)), again)
    model = _StandIn(question, case.query.handle if layers else None)
    try:
        with kept_randomness(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            with contextlib.redirect_stdout(io.StringIO()):
                metric = getattr(metrics, kind)(
                    abs=False, normalise=False, return_aggregate=False, disable_warnings=True, **options
                )
            return metric(
                model=model,
                x_batch=_single(sight.shown),
                y_batch=question.classes,
                a_batch=question.maps.copy(),  # some are changed in place
                s_batch=None if case.masks is None else _single(case.masks[:, None]).astype(bool),
                channel_first=True,
                explain_func=question.explained,
                explain_func_kwargs=None,
                model_predict_kwargs=None,
                softmax=False,
                batch_size=len(maps),
            )
    except LoupeError:
        raise
    except FOREIGN as error:
        if error is question.error:
            raise
        raise NotApplicable(f"Quantus' {kind} makes nothing of these maps: {error}") from error
    finally:
        question.forget()


def numbers(found: Any) -> Tensor:
    """What Quantus returns as a tensor."""
    return torch.from_numpy(np.asarray(found, dtype=np.float64)).float()


def to_peak(maps: Tensor) -> Tensor:
    """Maps in units of their own largest magnitude."""
    return maps / maps.abs().flatten(1).amax(1).clamp(min=1e-30)[:, None, None]


def library() -> Any:
    """Quantus. Raises `MissingDependency`."""
    try:
        with kept_randomness(), warnings.catch_warnings():  # which imports of its own draw from
            warnings.simplefilter("ignore")
            import quantus
    except ImportError as error:
        raise MissingDependency.of("quantus", None) from error
    return quantus


@dataclass
class _Question:
    """What Quantus is answered from, until it is forgotten: its caches keep every module that it has seen."""

    sight: Sight | None
    maps: Any  # [N, 1, h, w]
    classes: Any
    again: Again | None
    error: BaseException | None = None
    models: list[_StandIn] = field(default_factory=list)

    def values(self, shown: Tensor) -> Tensor:
        assert self.sight is not None
        with self._ours():
            return self.sight.answer(shown)

    def explained(self, model: _StandIn, inputs: Any, targets: Any, **_: Any) -> Any:
        assert self.sight is not None and self.again is not None
        own = model is self.models[0]
        if own and np.array_equal(inputs, _single(self.sight.shown)) and np.array_equal(targets, self.classes):
            return self.maps.copy()
        with self._ours():
            variants = torch.from_numpy(inputs).to(self.sight.shown)
            return _double(self.again(variants, targets.tolist(), None if own else model.handle))

    def forget(self) -> None:
        for model in self.models:
            model.handle = model.inside = None
        self.sight = self.again = self.maps = None
        self.models.clear()

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.error = error
            raise


class _StandIn(nn.Module):
    """What Quantus takes for the model; a copy of it has a copy of the user's model, where it has one."""

    def __init__(self, question: _Question, handle: Handle | None) -> None:
        super().__init__()
        self.training = False  # not .eval(), which a user's module may have made its own
        self.question, self.handle = question, handle
        self.inside = None if handle is None else handle.module
        question.models.append(self)

    def forward(self, shown: Tensor) -> Tensor:
        return self.question.values(shown)

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """Itself alone: Quantus takes the last softmax out of a model that has one."""
        yield self

    def __deepcopy__(self, memo: object) -> _StandIn:
        handle = self.handle and Handle(copy.deepcopy(self.handle.module), self.handle.spec)
        return _StandIn(self.question, handle)


def _double(maps: Tensor) -> Any:
    return maps[:, None].detach().double().cpu().numpy()


def _single(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()
