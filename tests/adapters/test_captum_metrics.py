"""Captum's infidelity and sensitivity, as metrics of `compare`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from captum.metrics import infidelity as captums
from torch import Tensor

import torchloupe as tl
from judged import Additive
from torchloupe_adapters.captum.metrics import infidelity, max_sensitivity
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.metrics.case import Case
from torchloupe_core.query import Query


@pytest.fixture
def question() -> tuple[Query, Tensor]:
    """A query of a linear model, and its gradient for each image."""
    weights = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    handle = tl.wrap(Additive(weights), input_size=(2, 6, 6))
    return Query(handle, inputs, handle.bind("logit:0", inputs)), weights.expand(3, -1, -1, -1)


def test_the_slope_of_a_linear_model_is_never_unfaithful(question: Any) -> None:
    query, slope = question
    true = Case(query, slope.sum(1), attributed=slope)
    assert infidelity(true).abs().max() < 1e-6
    scaled = Case(query, slope.sum(1), attributed=-3 * slope)  # at its best scale
    assert infidelity(scaled).abs().max() < 1e-6
    other = Case(query, slope.sum(1), attributed=slope.flip(2))
    assert (infidelity(other) > 0.1).all()


def test_the_model_answers_the_same_noise_once(question: Any) -> None:
    query, slope = question
    one = Case(query, slope.flip(2).sum(1), attributed=slope.flip(2))
    other = Case(query, slope.flip(1).sum(1), attributed=slope.flip(1))
    alone, forwards = infidelity(other), query.handle.forwards
    infidelity(one)
    assert query.handle.forwards > forwards
    shared, forwards = Case(query, other.maps, attributed=other.attributed, shared=one.shared), query.handle.forwards
    assert torch.equal(infidelity(shared), alone) and query.handle.forwards == forwards
    infidelity(shared, spread=0.3)
    assert query.handle.forwards > forwards


def test_of_a_probability_it_asks_what_was_explained(question: Any) -> None:
    """In a comparison a class's probability is scored; near 1 it tells no map from another."""
    query, slope = question
    scored = replace(query, targets=query.handle.bind("prob:0", query.inputs))
    case = Case(scored, slope.sum(1), attributed=slope, explained=query)
    assert infidelity(case).abs().max() < 1e-6
    assert (infidelity(replace(case, explained=None, shared={})) > 1e-6).any()
    part = case.only(1, 3)
    assert part.explained is not None and torch.equal(part.explained.inputs, query.inputs[1:3])
    assert torch.equal(part.value_variants(part.query.inputs), query.score(query.inputs)[1:].detach())


def test_it_is_what_captum_says(question: Any) -> None:
    query, slope = question
    case, state = Case(query, slope.flip(2).sum(1), attributed=slope.flip(2)), torch.get_rng_state()
    assert query.batch >= 3 * 7
    found = infidelity(case, n_samples=7, spread=0.5)
    assert torch.equal(torch.get_rng_state(), state)

    def perturbed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.5 * torch.randn_like(inputs)
        return noise, inputs - noise

    torch.manual_seed(query.seed)
    expected = captums(
        query.handle.module,
        perturbed,
        query.inputs,
        slope.flip(2),
        target=0,
        n_perturb_samples=7,
        max_examples_per_batch=3 * 7,
        normalize=True,
    )
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)


def test_maps_that_follow_the_input_are_as_sensitive_as_it_is(question: Any) -> None:
    query, slope = question

    def follows(inputs: Tensor, images: list[int], **changes: Any) -> Tensor:
        assert images == sorted(images) and len(images) == len(inputs)
        return inputs.sum(1)

    def still(inputs: Tensor, images: list[int], **changes: Any) -> Tensor:
        return slope.sum(1)[images]

    steady = max_sensitivity(Case(query, slope.sum(1), again=still))
    assert steady.tolist() == [0, 0, 0]
    moved = max_sensitivity(Case(query, query.inputs.sum(1), again=follows), radius=0.1, n_samples=30, images=2)
    most = 2 * 0.1 * 6 / query.inputs.sum(1).flatten(1).norm(dim=1)  # two channels of 36 pixels, each by 0.1
    assert moved[2].isnan() and (moved[:2] < most[:2]).all() and (moved[:2] > 0.3 * most[:2]).all()


def test_bad_input_is_said(question: Any) -> None:
    query, slope = question
    for options in ({"n_samples": 0}, {"spread": 0.0}):
        with pytest.raises(BadInput, match="n_samples is at least 1"):
            infidelity(Case(query, slope.sum(1)), **options)
    with pytest.raises(NotApplicable, match="nothing to ask again"):
        max_sensitivity(Case(query, slope.sum(1)))
    with pytest.raises(BadInput, match="radius above 0"):
        max_sensitivity(Case(query, slope.sum(1), again=lambda *_, **__: slope.sum(1)), radius=0)
