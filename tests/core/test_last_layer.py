"""Similar features and representer points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_influence_head import DECAY, asked, cross_entropy, fitted, linear, objective_of, some
from torch.nn import functional as F

import torchloupe as tl


def test_feature_cosine_is_of_what_goes_into_the_head() -> None:
    train, test = some(12, 3), some(4, 3, seed=2)
    found = asked(linear(3), train, test, method="feature_cosine", weight_decay=None)
    rows, tests = train.tensors[0].flatten(1), test.tensors[0].flatten(1)
    torch.testing.assert_close(found.scores, F.cosine_similarity(tests[:, None], rows[None], dim=2))
    assert "neither label takes part" in found.sign


def test_representer_values_add_up_to_the_logits() -> None:
    train, test = some(40, 3), some(5, 3, seed=2)
    module = fitted(linear(3), objective_of(train, cross_entropy, DECAY, 3))
    logits = module(test.tensors[0]).detach()
    errors = module(train.tensors[0]).softmax(1).detach() - F.one_hot(train.tensors[1], 3)
    rows = torch.cat([train.tensors[0].flatten(1), torch.ones(40, 1)], 1)
    tests = torch.cat([test.tensors[0].flatten(1), torch.ones(5, 1)], 1)
    for k in range(3):
        found = asked(module, train, test, method="representer", target=f"logit:{k}")
        torch.testing.assert_close(found.scores, -errors[:, k] * (tests @ rows.T) / (DECAY * 40))
        torch.testing.assert_close(found.scores.sum(1), logits[:, k], rtol=1e-6, atol=1e-8)
        assert not found.diagnostics["refitted"] and found.diagnostics["representation_error"] < 1e-8


def test_a_head_at_no_minimum_is_fitted_first() -> None:
    train, test = some(40, 3), some(5, 3, seed=2)
    best = fitted(linear(3), objective_of(train, cross_entropy, DECAY, 3))
    expected = asked(best, train, test, method="representer", target="logit:1")
    start = linear(3)
    kept = [one.detach().clone() for one in start.parameters()]
    found = asked(start, train, test, method="representer", target="logit:1")
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-7)
    changed = int((start(test.tensors[0]).argmax(1) != best(test.tensors[0]).argmax(1)).sum())
    assert found.diagnostics["refitted"] and found.diagnostics["tests_changed"] == changed > 0
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), kept, strict=True))
    raw = asked(start, train, test, method="representer", target="logit:1", refit=False)
    assert raw.diagnostics["representation_error"] > 1


def test_a_free_bias_takes_no_share() -> None:
    train, test = some(40, 3), some(5, 3, seed=2)
    options: dict[str, Any] = {"weight_decay": {"1.weight": 0.05}, "damping": 1e-6, "target": "logit:0"}
    found = asked(linear(3), train, test, method="representer", **options)
    assert found.diagnostics["refitted"] and found.diagnostics["representation_error"] < 1e-6
    other = asked(linear(3), train, test, method="representer", **{**options, "target": "logit:1"})
    spread = (found.scores - other.scores).sum(1)  # without the bias it is linear in the image
    doubled = [(2 * image, int(label)) for image, label in test]
    again = asked(linear(3), train, doubled, method="representer", **options).scores
    more = asked(linear(3), train, doubled, method="representer", **{**options, "target": "logit:1"}).scores
    torch.testing.assert_close((again - more).sum(1), 2 * spread)


def test_representer_needs_weight_decay() -> None:
    with pytest.raises(tl.errors.BadInput, match="representer points need the weight_decay"):
        asked(linear(3), some(8, 3), some(2, 3), method="representer", weight_decay=None)
