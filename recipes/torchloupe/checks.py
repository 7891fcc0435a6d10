"""The contract of methods and models, for this package's tests and for yours.

    tl.checks.check_method("mine.smiles", model)
    tl.checks.check_source(tl.wrap(module, input_size=(3, 224, 224)))

One test for each promise, with pytest:

    @pytest.mark.parametrize("check", tl.checks.checks_of("explain"))
    def test_smiles(check):
        tl.checks.checks_of("explain")[check](tl.checks.trial("mine.smiles", model))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchloupe._explain import explain
from torchloupe._models import ModelLike, opened
from torchloupe_core import checks, registry
from torchloupe_core.checks import Source, Trial, checks_of, random_inputs
from torchloupe_core.registry import Method

__all__ = ["Source", "Trial", "check_method", "check_source", "checks_of", "source", "trial"]

VERBS = {"explain": explain}


def check_method(
    method: str | Method,
    model: ModelLike,
    inputs: Tensor | None = None,
    *,
    verb: str = "explain",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Runs every check of a method on a model. Raises `AssertionError` naming each promise that is broken.

    inputs: a float batch `[N, C, H, W]` of at least two images; without it, noise. options: given to the method in
    every run, small ones for costly methods.
    """
    checks.check_method(method, opened(model), inputs, explain=VERBS[verb], verb=verb, options=options)


def check_source(model: ModelLike, inputs: Tensor | None = None) -> None:
    """Runs every check of a model, as its source hands it over. Raises `AssertionError` naming each broken promise.

    Layers in forward order; every map in its shape and its place: a change in a corner of the image moves that corner;
    the default layer; predictions; a unit in the middle; CAM exact or refused; Grad-CAM and saliency. inputs: a float
    batch `[N, C, H, W]`; without it, noise.
    """
    checks.check_source(opened(model), inputs, explain=explain)


def trial(
    method: str | Method, model: ModelLike, inputs: Tensor | None = None, *, verb: str = "explain", **options: Any
) -> Trial:
    """What the checks of a verb take: one method on one model."""
    handle = opened(model)
    entry = registry.find(verb, method) if isinstance(method, str) else method
    return Trial(entry, handle, random_inputs(handle) if inputs is None else inputs, VERBS[verb], options)


def source(model: ModelLike, inputs: Tensor | None = None) -> Source:
    """What the checks of a source take: one model."""
    handle = opened(model)
    return Source(handle, random_inputs(handle) if inputs is None else inputs, explain)
