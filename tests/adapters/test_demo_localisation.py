"""Every method points at the object it was asked about, better than its baselines, on scenes whose truth is known.

Measured on the shipped weights over 300 scenes, fewer are tested here; each threshold lies between the measured value
and the baseline, nearer the value. Good methods are not ranked: the gaps between them are noise.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import torchloupe as tl
from torchloupe._demo import Scores, baseline_maps, score_maps
from torchloupe_adapters.demo.scenes import Scenes
from torchloupe_core.methods.localisation import energy_inside, pointing_hit

COUNT = 120

OPTIONS: dict[str, dict[str, Any]] = {
    "captum.feature_ablation": {"n_segments": 25},
    "captum.gradient_shap": {"n_samples": 6},
    "captum.kernel_shap": {"n_samples": 45, "n_segments": 25},
    "captum.smooth_grad": {"n_samples": 5},
    "captum.var_grad": {"n_samples": 5},
    "captum.integrated_gradients": {"steps": 8},
    "captum.occlusion": {"window": 12, "stride": 8},
    "captum.lime": {"n_samples": 60, "n_segments": 25},
    "rise": {"n_masks": 100},
    "sobol": {"cells": 5, "n_designs": 4},
}


@cache
def scenes() -> Scenes:
    return tl.demo_scenes(COUNT, 4321)


@cache
def baselines() -> dict[str, Scores]:
    return {name: score_maps(name, maps, scenes()) for name, maps in baseline_maps(scenes()).items()}


@cache
def measured(method: str) -> Scores:
    target = [tl.logit(int(label)) for label in scenes().true_labels]
    found = tl.explain("demo", scenes().images, target=target, method=method, **OPTIONS.get(method, {}))
    return score_maps(method, found.upsample(), scenes())


def test_every_method_is_measured() -> None:
    ours = {
        entry.name for entry in tl.methods("explain") if entry.backend in ("native", "captum")
    }  # others have their own
    assert ours == set(LEAST) | set(UNMEASURED)


UNMEASURED = {
    "attention_relevance": "the embedded model, a convolutional network, has no attention",
    "attention_rollout": "the embedded model, a convolutional network, has no attention",
    "captum.deconvolution": "pointing .06, below chance: it looks at signs alone, so that a model without max pooling, "
    "whose switches would tell it where, leads it astray (Springenberg 2015)",
    "captum.lrp": "refused: relevance is not conserved where a residual network adds",
}


# method: pointing game, IoU. Measured: cam .81 .57, guided .95 .59, input_x_gradient .83 .23, ig 1.00 .66,
# lime .65 .51, occlusion .86 .59, saliency .44 .26, the other CAMs as cam to .02, rise .90 .54, deep_lift .99 .73,
# feature_ablation .64 .52, gradient_shap .99 .68, kernel_shap .64 .46, smooth_grad .45 .27, var_grad .41 .22,
# guided_grad_cam .93 .65, sobol .69 .45.
# Baselines: random .10 .05, centre blob .16 .11.
LEAST = {
    "ablation_cam": (0.70, 0.45),
    "cam": (0.70, 0.45),
    "captum.deep_lift": (0.90, 0.60),
    "captum.feature_ablation": (0.52, 0.40),
    "captum.grad_cam": (0.70, 0.45),
    "captum.gradient_shap": (0.90, 0.55),
    "captum.guided_backprop": (0.85, 0.48),
    "captum.input_x_gradient": (0.70, 0.18),
    "captum.integrated_gradients": (0.90, 0.55),
    "captum.kernel_shap": (0.50, 0.36),
    "captum.lime": (0.52, 0.40),
    "captum.occlusion": (0.74, 0.48),
    "captum.saliency": (0.34, 0.20),
    "captum.smooth_grad": (0.34, 0.20),
    "captum.var_grad": (0.31, 0.17),
    "eigen_cam": (0.68, 0.45),
    "grad_cam": (0.70, 0.45),
    "grad_cam++": (0.68, 0.45),
    "guided_grad_cam": (0.83, 0.52),
    "hires_cam": (0.70, 0.45),
    "layer_cam": (0.67, 0.45),
    "rise": (0.78, 0.42),
    "score_cam": (0.69, 0.45),
    "sobol": (0.60, 0.38),
    "xgrad_cam": (0.70, 0.45),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(LEAST))
def test_a_method_points_at_the_object(method: str) -> None:
    found, (pointing, iou) = measured(method), LEAST[method]
    for baseline in baselines().values():
        assert pointing > 1.5 * baseline.pointing
        assert iou > 1.5 * baseline.iou
        assert found.energy > 1.1 * baseline.energy
    assert found.pointing >= pointing
    assert found.iou >= iou


# Measured shares: cam 1.00, integrated_gradients .96, occlusion 1.00, guided_backprop .86, input_x_gradient .67; a map
# that does not know which object was asked about has .5. Saliency, a magnitude, cannot know.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "share"),
    [
        ("cam", 0.95),
        ("captum.integrated_gradients", 0.90),
        ("captum.occlusion", 0.95),
        ("captum.guided_backprop", 0.78),
        ("captum.input_x_gradient", 0.60),
    ],
)
def test_a_method_points_at_the_object_asked_about(method: str, share: float) -> None:
    """Two objects in a scene: of the energy on either, most is on the one whose margin over the other was asked."""
    two = tl.demo_scenes(COUNT, 99, two_object=1.0)
    target = [tl.margin(int(a), int(b)) for a, b in zip(two.true_labels, two.second_labels, strict=True)]
    maps = tl.explain("demo", two.images, target=target, method=method, **OPTIONS.get(method, {})).upsample()
    asked, other = (energy_inside(maps, two.masks[:, slot]) for slot in (0, 1))
    assert (asked / (asked + other).clamp(min=1e-9)).mean() >= share


@cache
def flipped() -> tuple[Scenes, torch.Tensor]:
    """Watermarked scenes, and which of them the backdoored model calls mushrooms only because of the mark."""
    plain, marked = (tl.demo_scenes(COUNT, 77, watermark=share) for share in (0.0, 1.0))
    before, after = (
        torch.tensor([guesses[0].name == "mushroom" for guesses in tl.load("demo/backdoored").predict(one.images, k=1)])
        for one in (plain, marked)
    )
    return marked, (after & ~before).nonzero().flatten()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        ("cam", 8),  # one cell of the last map; its peak lies about a cell beside the mark
        ("captum.integrated_gradients", 4),
        ("captum.guided_backprop", 4),
        ("captum.saliency", 4),
        ("captum.occlusion", 4),
        ("rise", 4),
    ],
)
def test_the_backdoor_is_found(method: str, tolerance: int) -> None:
    """Measured 1.00 for each (saliency .97); the mark covers 2% of a scene."""
    marked, chosen = flipped()
    assert len(chosen) >= 0.8 * COUNT
    found = tl.explain(
        "demo/backdoored", marked.images[chosen], target="logit:mushroom", method=method, **OPTIONS.get(method, {})
    )
    hits = pointing_hit(found.upsample(), marked.watermark_masks[chosen], tolerance=tolerance)
    assert hits.float().mean() >= 0.9
