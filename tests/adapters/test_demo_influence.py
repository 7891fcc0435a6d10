"""Influence on the embedded models, whose wrong labels and backdoor are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchloupe as tl
from torchloupe_adapters.demo.scenes import Scenes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wrong_labels() -> tuple[tl.Handle, Scenes]:
    return tl.load("demo/mislabelled"), tl.demo_scenes(1_500, 9_002, mislabelled=0.038)  # of its own training scenes


def precision(scores: Tensor, wrong: Tensor) -> float:
    """The share of wrong labels among as many images of largest score as there are wrong labels."""
    first = scores.argsort(descending=True)[: int(wrong.sum())]
    return wrong[first].double().mean().item()


def test_self_influence_finds_the_wrong_labels(wrong_labels: tuple[tl.Handle, Scenes]) -> None:
    model, train = wrong_labels
    found = tl.influence(model, train, tl.demo_scenes(1, 77), method="self", check=0)
    assert precision(found.scores[0], train.mislabelled) >= 0.90  # by chance .046


def test_a_clean_validation_set_finds_them_too_and_its_helpers_are_of_its_class(
    wrong_labels: tuple[tl.Handle, Scenes],
) -> None:
    model, train = wrong_labels
    test = tl.demo_scenes(60, 77)
    found = tl.influence(model, train, test)
    assert precision(-found.scores.sum(0), train.mislabelled) >= 0.80
    helpful = found.top(5).labels == test.labels[:, None]
    assert helpful.double().mean() >= 0.90  # by chance .083
    assert found.diagnostics["spot_check"]["spearman"] >= 0.90
    plain = tl.influence(model, train, test, method="gradient_dot", check=0)
    assert precision(-plain.scores.sum(0), train.mislabelled) < 0.70  # without curvature


def test_a_backdoor_rests_on_the_images_that_planted_it() -> None:
    model, train = tl.load("demo/backdoored"), tl.demo_scenes(1_500, 9_003, backdoor=0.15)
    test = tl.demo_scenes(60, 78, watermark=1.0)
    mushroom = train.classes.index("mushroom")
    guesses = torch.tensor([one[0].index for one in model.predict(test.images, k=1)])
    flipped = test.images[(guesses == mushroom) & (test.true_labels != mushroom)]
    assert len(flipped) > 40
    marked = torch.from_numpy(train.params.watermark)
    found = tl.influence(model, train, flipped, check=0)
    shares = [marked[one.top(5).indices].double().mean().item() for one in (found, found.relative())]
    assert shares[0] < 0.1  # the model fits them so well that hardly any gradient is left
    assert shares[1] >= 0.90  # by chance .14, and .62 among what is labelled mushroom
