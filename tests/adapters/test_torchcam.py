"""torch-cam: what only it has, against formulas."""

from __future__ import annotations

import pytest
import torch

import torchloupe as tl
from torchloupe_core.specimens import SPECIMENS

pytest.importorskip("torchcam")


@pytest.fixture
def residual() -> tuple[tl.Handle, torch.Tensor]:
    return SPECIMENS["residual"]()


def test_finer_cam_is_grad_cam_of_a_difference_of_logits(residual: tuple[tl.Handle, torch.Tensor]) -> None:
    handle, inputs = residual
    logits = handle.module(inputs).detach()
    found = tl.explain(handle, inputs, target=3, method="torchcam.finer_cam", gamma=0.6, n_references=2)
    targets = []
    for row in logits:
        first, second = (row - row[3]).abs().argsort()[1:3].tolist()
        targets.append(f"logit:3-0.3*logit:{first}-0.3*logit:{second}")
    expected = tl.explain(handle, inputs, target=targets, method="grad_cam")
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-6)


def test_finer_cam_compares_one_logit(residual: tuple[tl.Handle, torch.Tensor]) -> None:
    handle, inputs = residual
    with pytest.raises(tl.errors.NotApplicable, match="use grad_cam"):
        tl.explain(handle, inputs, target="prob:dog", method="torchcam.finer_cam")
    with pytest.raises(tl.errors.BadInput, match="n_references"):
        tl.explain(handle, inputs, target=3, method="torchcam.finer_cam", n_references=0)


def test_its_grad_cam_plus_plus_lacks_the_denominator(residual: tuple[tl.Handle, torch.Tensor]) -> None:
    handle, inputs = residual
    with handle.watch("layer2", leaf="layer2", through=True, shape=(3, 32, 32)) as watch, torch.enable_grad():
        (gradient,) = torch.autograd.grad(watch(inputs)[:, 2].sum(), watch["layer2"])
        weights = (gradient.square() * gradient.relu()).sum((2, 3), keepdim=True)
        expected = (weights * watch["layer2"]).sum(1).detach()
    found = tl.explain(handle, inputs, target=2, method="torchcam.grad_cam++").values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_without_noise_smooth_score_cam_is_score_cam_of_enlarged_masks() -> None:
    """A single sample of next to no noise, and one step of integration: the weights of its Score-CAM."""
    handle, inputs = SPECIMENS["plain"]()
    expected = tl.explain(handle, inputs, target=1, method="torchcam.score_cam").values
    smooth = tl.explain(handle, inputs, target=1, method="torchcam.ss_cam", n_samples=1, std=1e-6).values
    integrated = tl.explain(handle, inputs, target=1, method="torchcam.is_cam", n_samples=1).values
    torch.testing.assert_close(smooth, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(integrated, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["smooth_grad_cam++", "ss_cam"])
def test_noise_follows_the_seed(method: str) -> None:
    handle, inputs = SPECIMENS["plain"]()
    first, again, other = (
        tl.explain(handle, inputs, method=f"torchcam.{method}", n_samples=2, seed=seed).values for seed in (3, 3, 4)
    )
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other)
    with pytest.raises(tl.errors.BadInput, match="n_samples"):
        tl.explain(handle, inputs, method=f"torchcam.{method}", n_samples=0)


def test_targets_that_are_no_logits_are_asked_as_well(residual: tuple[tl.Handle, torch.Tensor]) -> None:
    handle, inputs = residual
    target = "layer2:4-0.5*logit:2"
    found, expected = (
        tl.explain(handle, inputs, target=target, layer="layer1", method=name).values
        for name in ("torchcam.layer_cam", "layer_cam")
    )
    torch.testing.assert_close(found, expected)
