"""Quantus' metrics of faithfulness: the image is changed where a map says it matters."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_adapters.quantus.asked import (
    Sight,
    covered,
    evaluated,
    library,
    numbers,
    to_peak,
    values_of,
)
from torchloupe_core.atoms import Output
from torchloupe_core.baselines import Baseline
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.metrics.case import Case
from torchloupe_core.metrics.faithfulness import SHARES, area
from torchloupe_core.registry import method

__all__ = [
    "faithfulness_correlation",
    "faithfulness_estimate",
    "infidelity",
    "monotonicity",
    "monotonicity_correlation",
    "non_sensitivity",
    "pixel_flipping",
    "region_perturbation",
    "road",
    "selectivity",
    "sufficiency",
]

STEPS = "forwards: as many as the image is wide"
SQUARES = "forwards: 1 for each square of 8 pixels"

NGUYEN = "Nguyen and Martínez 2020, On Quantitative Aspects of Model Interpretability"


@method(
    "compare",
    "quantus.pixel_flipping",
    better="lower",
    cost=STEPS,
    paper="Bach et al. 2015, On Pixel-Wise Explanations by Layer-Wise Relevance Propagation",
)
def pixel_flipping(case: Case, *, step: int | None = None, baseline: Baseline = 0.0) -> Tensor:
    """The mean height of the target's value as pixels give way to the baseline, the highest first.

    step: pixels at a time, a divisor of their number; as many as the image is wide unless given. The curve begins after
    the first step, where `deletion` begins before it. Quantus' own area is that times the number of steps less one.
    """
    return _height(_removed(case, "PixelFlipping", baseline, features_in_step=_step(case, step)))


@method(
    "compare",
    "quantus.region_perturbation",
    better="higher",
    cost=SQUARES,
    paper="Samek et al. 2015, Evaluating the Visualization of What a Deep Neural Network Has Learned (AOPC)",
)
def region_perturbation(case: Case, *, patch_size: int = 8, n_regions: int = 100, baseline: Baseline = 0.0) -> Tensor:
    """The mean loss of the target's value as squares give way to the baseline, those of the highest sum first.

    n_regions: how many at most. Quantus calls it better when lower; a faithful map loses more, so that higher is.
    """
    _at_least_one(patch_size=patch_size, n_regions=n_regions)
    options = {"patch_size": patch_size, "regions_evaluation": n_regions}
    return _removed(case, "RegionPerturbation", baseline, **options).mean(1)


@method(
    "compare",
    "quantus.selectivity",
    better="lower",
    cost=SQUARES,
    paper="Montavon et al. 2018, Methods for Interpreting and Understanding Deep Neural Networks",
)
def selectivity(case: Case, *, patch_size: int = 8, baseline: Baseline = 0.0) -> Tensor:
    """The mean height of the target's value as squares give way to the baseline, those of the highest sum first."""
    _at_least_one(patch_size=patch_size)
    return _height(_removed(case, "Selectivity", baseline, patch_size=patch_size))


@method(
    "compare",
    "quantus.faithfulness_correlation",
    better="higher",
    cost="forwards: 100",
    paper="Bhatt et al. 2020, Evaluating and Aggregating Feature-based Model Explanations; Ancona et al. 2018",
    random=True,
)
def faithfulness_correlation(
    case: Case, *, n_samples: int = 100, subset_size: int = 224, baseline: Baseline = 0.0
) -> Tensor:
    """The correlation of a subset's sum of the map with what the target's value loses without it, over random subsets.

    subset_size: pixels in each, fewer than the image has.
    """
    _at_least_one(n_samples=n_samples, subset_size=subset_size)
    if subset_size >= case.maps[0].numel():
        raise BadInput(f"subset_size is less than the image's {case.maps[0].numel()} pixels; got {subset_size}")
    return _removed(case, "FaithfulnessCorrelation", baseline, nr_runs=n_samples, subset_size=subset_size)


@method(
    "compare",
    "quantus.faithfulness_estimate",
    better="higher",
    cost=STEPS,
    paper="Alvarez-Melis and Jaakkola 2018, Towards Robust Interpretability with Self-Explaining Neural Networks",
)
def faithfulness_estimate(case: Case, *, step: int | None = None, baseline: Baseline = 0.0) -> Tensor:
    """The correlation of the map's sums over groups of pixels with what the target's value loses without each group.

    step: pixels in a group, the highest together; as in quantus.pixel_flipping.
    """
    return _removed(case, "FaithfulnessEstimate", baseline, features_in_step=_step(case, step))


@method(
    "compare",
    "quantus.monotonicity",
    better="higher",
    cost=STEPS,
    paper="Arya et al. 2019, One Explanation Does Not Fit All (AI Explainability 360)",
)
def monotonicity(case: Case, *, step: int | None = None, baseline: Baseline = 0.0) -> Tensor:
    """1 where the target's value never falls as pixels come into the baseline, the lowest first. Seldom so.

    step: as in quantus.pixel_flipping. Quantus alone puts the baseline in place of itself, and says 1 of any map.
    """
    return _removed(case, "Monotonicity", baseline, features_in_step=_step(case, step), perturb_func=_put_in)


@method(
    "compare",
    "quantus.monotonicity_correlation",
    better="higher",
    cost="forwards: 10 times as many as the image is wide",
    paper=NGUYEN,
    random=True,
)
def monotonicity_correlation(case: Case, *, step: int | None = None, n_samples: int = 10) -> Tensor:
    """The rank correlation of the magnitudes' sums over groups of pixels with how uncertain the target is without each.

    Which is the mean square by which its value changes as the group becomes one grey or another, drawn evenly between
    black and white. step: as in quantus.pixel_flipping.
    """
    _at_least_one(n_samples=n_samples)
    inputs, spec = case.query.inputs, case.query.handle.spec
    grey = covered(case, fill=lambda drawn: torch.where(drawn < 1, spec.normalised(drawn.expand_as(inputs)), inputs))
    options: dict[str, Any] = {"features_in_step": _step(case, step), "nr_samples": n_samples, "eps": 0.0}
    return numbers(
        evaluated(case, "MonotonicityCorrelation", grey, case.maps.abs(), perturb_baseline="uniform", **options)
    )


@method(
    "compare",
    "quantus.infidelity",
    better="lower",
    cost=SQUARES,
    paper="Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations, square removal",
)
def infidelity(case: Case, *, patch_size: int = 8, baseline: Baseline = 0.0) -> Tensor:
    """How far the map's sums over squares, at their best scale, are from what the target's value loses without each.

    The mean square, in units of that value. patch_size: squares of so many pixels fill the image. Quantus alone removes
    squares one after the other and never puts one back, and judges a map by its scale.
    """
    covered(case, baseline, patch=patch_size)  # refuses squares that do not fill the image
    hooks: dict[str, Any] = {"perturb_func": _one_hole, "loss_func": _off_at_best_scale}
    return _removed(case, "Infidelity", baseline, perturb_patch_sizes=[patch_size], n_perturb_samples=1, **hooks)


@method(
    "compare",
    "quantus.sufficiency",
    better="higher",
    cost="1 forward",
    paper="Dasgupta et al. 2022, Framework for Evaluating Faithfulness of Local Explanations",
)
def sufficiency(case: Case, *, threshold: float = 0.6) -> Tensor:
    """The share of the images with a similar map that the model predicts the same class for; NaN where none is similar.

    Similar maps' magnitudes are no farther apart than `threshold` times the farthest of the images judged together, 16
    in a comparison, each pixel in units of its standard deviation: so this is a number of that company as well.
    """
    if len(case) < 2:
        raise NotApplicable("sufficiency compares images with each other, and there is one")
    classes = Sight(case.query.inputs, lambda x: values_of(case, x))
    alone = Sight(case.query.inputs, lambda x: torch.zeros(len(x), 1))  # one class, so the share is 1 where any is near
    found, near = (
        numbers(evaluated(case, "Sufficiency", sight, case.maps.abs(), threshold=threshold))
        for sight in (classes, alone)
    )
    return found.where(near > 0, torch.nan)


@method(
    "compare",
    "quantus.road",
    better="lower",
    cost="forwards: 9",
    paper="Rong et al. 2022, A Consistent and Efficient Evaluation Strategy for Attribution Methods (MoRF)",
    random=True,
)
def road(case: Case, *, shares: tuple[float, ...] = SHARES, noise: float = 0.01) -> Tensor:
    """At how many of the `shares` of the highest pixels removed the model still predicts the target's class.

    Removed pixels become the weighted mean of their neighbours plus noise of that standard deviation, solved exactly,
    which takes about a second at 224 pixels, each time. For targets that are classes. Quantus alone gives one curve for
    all images, and fails on those of several channels.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise BadInput(f"shares are parts of the pixels, each above 0 and below 1; got {shares}")
    options: dict[str, Any] = {"percentages": [round(100 * share, 6) for share in shares], "perturb_func": _hidden}
    classes, found = _classes(case), torch.full((len(case),), torch.nan)
    for index, label in enumerate(classes):
        one = case.only(index, index + 1)
        above = one.maps - one.maps.amin()  # Quantus refuses maps below zero, whose order is as good
        if above.any():  # a constant map has no order
            sight = Sight(torch.ones_like(above[:, None]), partial(_imputed_outputs, one, noise))
            kept = evaluated(one, "ROAD", sight, above, classes=[label], **options)
            found[index] = sum(kept.values()) / len(shares)
    return found


@method("compare", "quantus.non_sensitivity", better="lower", cost=SQUARES, paper=NGUYEN)
def non_sensitivity(case: Case, *, patch_size: int = 8, eps: float = 0.01, baseline: Baseline = 0.0) -> Tensor:
    """The number of squares where the map and the model disagree on whether they matter at all.

    To the map one does with at least `eps` of the largest mean magnitude of a square, to the model if the target's
    value changes by `eps` or more without it. patch_size: squares of so many pixels fill the image.
    """
    sight = covered(case, baseline, patch=patch_size)
    means = to_peak(F.avg_pool2d(case.maps.abs()[:, None], patch_size)[:, 0])
    return numbers(evaluated(case, "NonSensitivity", sight, means, eps=eps, perturb_baseline=0.0))


def _removed(case: Case, kind: str, baseline: Baseline, **options: Any) -> Tensor:
    """What Quantus says where the baseline stands in for pixels of the map."""
    return numbers(evaluated(case, kind, covered(case, baseline), case.maps, perturb_baseline=0.0, **options))


def _height(curves: Tensor) -> Tensor:
    """`[N]`: the mean height of curves `[N, n]`; of one point, the point."""
    return area(curves) if curves.shape[1] > 1 else curves[:, 0]


def _classes(case: Case) -> list[int]:
    """The class that each target is the logit or the probability of. Raises `NotApplicable` for any other target."""
    found = []
    for bound in case.query.targets:
        weight, atom = bound.terms[0]
        if len(bound.terms) > 1 or weight != 1 or not isinstance(atom, Output) or atom.kind not in ("logit", "prob"):
            raise NotApplicable(
                f"quantus.road asks which class is predicted, and {bound.target} is no class; road is of any target"
            )
        found.append(int(atom.label))
    return found


def _step(case: Case, step: int | None) -> int:
    pixels, chosen = case.maps[0].numel(), case.maps.shape[2] if step is None else step
    if chosen < 1 or pixels % chosen:
        raise BadInput(f"step is a number of pixels, a divisor of the image's {pixels}; got {chosen}")
    return chosen


def _at_least_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise BadInput(f"{name} is at least 1; got {value}")


def _put_in(arr: Any, indices: Any, **_: object) -> Any:
    """Pixels `[N, P]` of the cover back in their places."""
    found = arr.copy()
    np.put_along_axis(found, indices, 1.0, axis=1)
    return found


def _one_hole(arr: Any, indices: Any, **_: object) -> Any:
    """The whole cover `[N, P]` but for these pixels, whatever was removed before."""
    found = np.ones_like(arr)
    np.put_along_axis(found, indices, 0.0, axis=1)
    return found


def _hidden(arr: Any, indices: Any, **_: object) -> Any:
    """The cover `[1, H, W]` without these pixels."""
    found = arr.copy()
    found.reshape(-1)[indices] = 0.0
    return found


def _off_at_best_scale(a: Any, b: Any, **_: object) -> Any:
    """`[N]`: the mean square of `a [N, S]` less the multiple of `b` that is nearest to it."""
    size = (b * b).sum(1, keepdims=True)
    scale = (a * b).sum(1, keepdims=True) / np.where(size > 0, size, 1.0)
    return ((a - scale * b) ** 2).mean(1)


def _imputed_outputs(case: Case, noise: float, cover: Tensor) -> Tensor:
    """`[1, K]`: the model's of the image whose pixels out of the cover `[1, 1, H, W]` Quantus fills in."""
    impute = library().functions.perturb_func.noisy_linear_imputation
    image = case.query.inputs[0].double().cpu().numpy()
    filled = impute(arr=image, indices=np.flatnonzero(cover.cpu().numpy() < 1), noise=noise)
    return values_of(case, torch.from_numpy(filled)[None])
