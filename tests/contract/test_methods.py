"""Every registered method of `explain` on every specimen keeps every promise of the contract.

Those of packages that need not be installed are in `test_peer_methods.py`.
"""

from __future__ import annotations

import functools

import pytest
from small import goes_on_in_smaller_batches

import torchloupe as tl
from torchloupe_core.checks import Trial
from torchloupe_core.specimens import SPECIMENS

PEERS = {"grad_cam", "lime", "shap", "torchcam", "zennit"}

# Small options for costly methods.
OPTIONS = {
    "rise": {"n_masks": 16},
    "sobol": {"cells": 3, "n_designs": 8, "baseline": 30.0},  # shares of a variance as small as rounding are rounding
    "captum.feature_ablation": {"n_segments": 8},
    "captum.gradient_shap": {"n_samples": 4},
    "captum.integrated_gradients": {"steps": 4},
    "captum.kernel_shap": {"n_samples": 30, "n_segments": 8},
    "captum.lime": {"n_samples": 30, "n_segments": 8},
    "captum.occlusion": {"window": 8, "stride": 8},
    "captum.smooth_grad": {"n_samples": 4},
    "captum.var_grad": {"n_samples": 4},
}
METHODS = [entry.name for entry in tl.methods("explain") if entry.backend not in PEERS]

# Which methods refuse which specimens, so that neither a refusal nor an answer appears unnoticed.
NO_RELU_MODULES = {"concat", "depthwise", "nhwc", "vit_registers"}
NO_PLAIN_ATTENTION = set(SPECIMENS) - {"vit_registers"}
REFUSED = {
    "attention_relevance": NO_PLAIN_ATTENTION,
    "attention_rollout": NO_PLAIN_ATTENTION,
    "cam": {"concat", "vit_registers"},
    "captum.deconvolution": NO_RELU_MODULES,
    "captum.deep_lift": NO_RELU_MODULES,
    "captum.grad_cam": {"nhwc", "vit_registers"},
    "captum.guided_backprop": NO_RELU_MODULES,
    "captum.lrp": NO_RELU_MODULES | {"residual", "inplace"},
    "guided_grad_cam": {"depthwise", "nhwc", "vit_registers"},
}


@functools.cache
def _trial(method: str, specimen: str) -> Trial:
    """One for all checks, which share its first result."""
    handle, inputs = SPECIMENS[specimen]()
    return tl.checks.trial(method, handle, inputs, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("specimen", SPECIMENS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_taken_are_counted(method: str, specimen: str) -> None:
    """By the methods whose tag says that they need one, and by no others."""
    trial = _trial(method, specimen)
    if not trial.refused:
        backwards, images = trial.reference.backwards, len(trial.inputs)
        assert (backwards >= images) == ("gradient" in trial.method.needs) and (backwards >= images or not backwards)


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_every_method_goes_on_in_smaller_batches(method: str, batch_size: int | None) -> None:
    goes_on_in_smaller_batches(method, batch_size, OPTIONS.get(method, {}))
