"""The methods of packages that need not be installed keep the same promises, on a few specimens each.

torch-cam is installed for the tests; `pip install "torchloupe[peers]" zennit` for all of them.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from small import goes_on_in_smaller_batches
from test_methods import PEERS

import torchloupe as tl
from torchloupe_core.checks import Trial
from torchloupe_core.specimens import SPECIMENS

pytestmark = pytest.mark.slow

IMPORTED_AS = {"grad_cam": "pytorch_grad_cam"}

OPTIONS: dict[str, dict[str, Any]] = {
    "lime.image": {"n_samples": 30, "n_segments": 8},
    "shap.partition": {"max_evals": 24},
    "torchcam.is_cam": {"n_samples": 2},
    "torchcam.smooth_grad_cam++": {"n_samples": 2},
    "torchcam.ss_cam": {"n_samples": 2},
}
METHODS = {entry.name: entry.backend for entry in tl.methods("explain") if entry.backend in PEERS}

# One kind of layout and one of structure each; more where the method is at home, and one where it costs much.
FEW = ("plain", "vit_registers")
ALL_OF = {
    "grad_cam.grad_cam": ("plain", "residual", "concat", "inplace", "nhwc", "vit_registers"),
    "grad_cam.ablation_cam": ("plain", "residual", "vit_registers"),
    "lime.image": ("plain",),
    "shap.partition": ("grayscale",),
    "torchcam.grad_cam": ("plain", "residual", "concat", "inplace", "nhwc", "vit_registers"),
    "torchcam.ss_cam": ("plain",),
    "torchcam.is_cam": ("plain",),
    "zennit.epsilon_plus": ("plain", "residual", "concat", "inplace", "vit_registers"),
}
ASKED = [(method, specimen) for method in METHODS for specimen in ALL_OF.get(method, FEW)]
REFUSED = {"torchcam.cam": {"vit_registers"}, "zennit.epsilon_plus": {"inplace", "vit_registers"}} | {
    method: {"vit_registers"} for method in METHODS if method.startswith("zennit.") and method not in ALL_OF
}


def _installed(method: str) -> None:
    backend = METHODS[method]
    pytest.importorskip(IMPORTED_AS.get(backend, backend))


@functools.cache
def _trial(method: str, specimen: str) -> Trial:
    """One for all checks, which share its first result."""
    handle, inputs = SPECIMENS[specimen]()
    return tl.checks.trial(method, handle, inputs, **OPTIONS.get(method, {}))


def test_every_peer_has_methods() -> None:
    assert set(METHODS.values()) == PEERS


@pytest.mark.parametrize("check", tl.checks.checks_of("explain"))
@pytest.mark.parametrize(("method", "specimen"), ASKED)
def test_contract_of_peers(method: str, specimen: str, check: str) -> None:
    _installed(method)
    tl.checks.checks_of("explain")[check](_trial(method, specimen))


@pytest.mark.parametrize("method", METHODS)
def test_peers_refuse_exactly_what_they_must(method: str) -> None:
    _installed(method)
    refused = {specimen for name, specimen in ASKED if name == method and _trial(method, specimen).refused}
    assert refused == REFUSED.get(method, set())


@pytest.mark.parametrize("method", METHODS)
def test_every_peer_goes_on_in_smaller_batches(method: str) -> None:
    _installed(method)
    goes_on_in_smaller_batches(method, 16, OPTIONS.get(method, {}))
