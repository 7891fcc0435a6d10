"""Every registered method of `explain` on every specimen keeps every promise of the contract."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import torchloupe as tl
from torchloupe_core.checks import Trial
from torchloupe_core.specimens import SPECIMENS

# Small options for costly methods.
OPTIONS = {
    "rise": {"n_masks": 16},
    "captum.integrated_gradients": {"steps": 4},
    "captum.lime": {"n_samples": 30, "n_segments": 8},
    "captum.occlusion": {"window": 8, "stride": 8},
}
METHODS = [entry.name for entry in tl.methods("explain")]

# Which methods refuse which specimens, so that neither a refusal nor an answer appears unnoticed.
NO_RELU_MODULES = {"concat", "depthwise", "nhwc", "vit_registers"}
NO_PLAIN_ATTENTION = set(SPECIMENS) - {"vit_registers"}
REFUSED = {
    "attention_relevance": NO_PLAIN_ATTENTION,
    "attention_rollout": NO_PLAIN_ATTENTION,
    "cam": {"concat", "vit_registers"},
    "captum.guided_backprop": NO_RELU_MODULES,
}


@functools.cache
def _trial(method: str, specimen: str) -> Trial:
    """One for all checks, which share its first result."""
    handle, inputs = SPECIMENS[specimen]()
    return tl.checks.trial(method, handle, inputs, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("check", tl.checks.checks_of("explain"))
@pytest.mark.parametrize("specimen", SPECIMENS)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method: str, specimen: str, check: str) -> None:
    tl.checks.checks_of("explain")[check](_trial(method, specimen))


@pytest.mark.parametrize("method", METHODS)
def test_refuses_exactly_what_it_must(method: str) -> None:
    refused = {specimen for specimen in SPECIMENS if _trial(method, specimen).refused}
    assert refused == REFUSED.get(method, set())


def test_every_specimen_has_several_methods() -> None:
    for specimen in SPECIMENS:
        answering = [method for method in METHODS if not _trial(method, specimen).refused]
        assert len(answering) >= 5, specimen


class Small(nn.Module):
    """A model whose device holds three images at most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.most = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3), 10**6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found: torch.Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_every_method_goes_on_in_smaller_batches(method: str, batch_size: int | None) -> None:
    images, options = torch.randn(7, 3, 16, 16), OPTIONS.get(method, {})
    roomy, small = (tl.wrap(Small(), input_size=(3, 16, 16)) for _ in range(2))
    try:
        expected = tl.explain(roomy, images, target=1, method=method, batch_size=2, **options)
    except tl.errors.NotApplicable:
        pytest.skip("not for this model")
    assert small.layers  # traced with two images
    small.module.most = 3
    found = tl.explain(small, images, target=1, method=method, batch_size=batch_size, **options)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-6)
