"""A method on a model, and a model by itself, as the checks see them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchloupe_core import registry
from torchloupe_core.checks.survey import Survey, survey
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.registry import Method
from torchloupe_core.results import Attribution

__all__ = ["Explain", "Source", "Trial", "gap", "random_inputs", "tolerance"]

Explain = Callable[..., Attribution]
Subject = TypeVar("Subject", "Trial", "Source")

RELATIVE, OF_SCORE = 1e-4, 1e-6  # of the largest value; of the largest score, whose differences round at its precision


@dataclass(frozen=True)
class Trial:
    """One method on one model. `explain` is the verb as users call it; `options` go to it in every run."""

    method: Method
    handle: Handle
    inputs: Tensor
    explain: Explain
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method.name} on {self.handle.spec.name}"

    @property
    def shape(self) -> Shape:
        """(C, H, W) of the inputs."""
        return self.inputs.shape[1], self.inputs.shape[2], self.inputs.shape[3]

    @functools.cached_property
    def outcome(self) -> Attribution | NotApplicable:
        """The result for all inputs at the default seed, or the refusal."""
        try:
            return self.run()
        except NotApplicable as refusal:
            return refusal

    @property
    def reference(self) -> Attribution:
        """The result for all inputs at the default seed. Raises `NotApplicable` where the method refuses the model."""
        if isinstance(self.outcome, NotApplicable):
            raise self.outcome
        return self.outcome

    @property
    def refused(self) -> bool:
        """Whether the method refuses this model."""
        return isinstance(self.outcome, NotApplicable)

    def run(self, inputs: Tensor | None = None, *, on: Handle | None = None, **changes: Any) -> Attribution:
        """The verb, called the way users call it."""
        given = {"progress": False, **self.options, **changes}
        with registry.registered(self.method):
            return self.explain(
                on or self.handle, self.inputs if inputs is None else inputs, method=self.method.name, **given
            )

    def attempt(self, inputs: Tensor, *, on: Handle) -> Attribution | None:
        """`run`, or None where the method refuses."""
        try:
            return self.run(inputs, on=on)
        except NotApplicable:
            return None

    def copy(self) -> Handle:
        """The model once more, with nothing remembered about it: a check may do to it what it likes."""
        return Handle(copy.deepcopy(self.handle.module), self.handle.spec)

    def require(self, holds: bool, problem: str) -> None:
        """Raises `AssertionError` unless `holds`."""
        if not holds:
            raise AssertionError(f"{self}: {problem}")

    def require_equal(self, found: Attribution, expected: Attribution, what: str, slack: float = 1.0) -> None:
        """Raises `AssertionError` unless two results agree up to rounding."""
        self.require(found.values.shape == expected.values.shape, f"{what} gives another shape")
        apart, allowed = gap(found, expected), slack * tolerance(expected, self.handle.dtype)
        self.require(
            apart <= allowed, f"{what} gives another result; values differ by {apart:.3g}, above {allowed:.3g}"
        )


@dataclass(frozen=True)
class Source:
    """One model as its source adapter hands it over."""

    handle: Handle
    inputs: Tensor
    explain: Explain

    def __str__(self) -> str:
        return f"model {self.handle.spec.name}"

    @property
    def shape(self) -> Shape:
        """(C, H, W) of the inputs."""
        return self.inputs.shape[1], self.inputs.shape[2], self.inputs.shape[3]

    @functools.cached_property
    def survey(self) -> Survey:
        """What each layer gives for the first image and four changes of it."""
        return survey(self.handle, self.handle.inputs(self.inputs)[:1])

    def require(self, holds: bool, problem: str) -> None:
        """Raises `AssertionError` unless `holds`."""
        if not holds:
            raise AssertionError(f"{self}: {problem}")


def gap(found: Attribution, expected: Attribution) -> float:
    """The largest difference between two results' values."""
    return float((found.values - expected.values).abs().max())


def tolerance(expected: Attribution, dtype: torch.dtype) -> float:
    """How far two computations of the same values may lie apart by rounding, in the model's precision."""
    largest, score = float(expected.values.abs().max()), float(expected.scores.abs().max())
    coarser = max(1.0, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    return coarser * (RELATIVE * largest + OF_SCORE * score)


def random_inputs(handle: Handle, n: int = 3) -> Tensor:
    """A batch of noise of the model's own input size, `[n, C, H, W]`."""
    if handle.spec.input_size is None:
        raise BadInput("this model's input size is not known; give the checks inputs, a float batch [N, C, H, W]")
    noise = torch.randn((n, *handle.spec.input_size), generator=torch.Generator().manual_seed(0))
    return noise.to(handle.device, handle.dtype)
