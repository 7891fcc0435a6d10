"""Metrics of Quantus that read the map alone, or the map and a mask: complexity and localisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nan

from torchloupe_adapters.quantus.asked import evaluated, numbers, seen, to_peak
from torchloupe_core.errors import BadInput
from torchloupe_core.metrics.case import Case
from torchloupe_core.registry import method

__all__ = [
    "attribution_localisation",
    "auc",
    "complexity",
    "effective_complexity",
    "pointing_game",
    "relevance_mass_accuracy",
    "relevance_rank_accuracy",
    "sparseness",
    "top_k_intersection",
]

NONE = "no forward"
ARRAS = "Arras et al. 2021, CLEVR-XAI: A Benchmark Dataset for the Ground Truth Evaluation of Explanations"


# -- complexity -------------------------------------------------------------------------------------------------------


@method(
    "compare",
    "quantus.sparseness",
    better="higher",
    cost=NONE,
    paper="Chalasani et al. 2020, Concise Explanations of Neural Networks using Adversarial Training (Gini)",
)
def sparseness(case: Case) -> Tensor:
    """The Gini index of the magnitudes, of the largest; Quantus adds 1e-7 to each. As `sparsity`."""
    return numbers(evaluated(case, "Sparseness", seen(case), to_peak(case.maps.abs())))


@method(
    "compare",
    "quantus.complexity",
    better="lower",
    cost=NONE,
    paper="Bhatt et al. 2020, Evaluating and Aggregating Feature-based Model Explanations, definition 3",
)
def complexity(case: Case) -> Tensor:
    """The entropy of the magnitudes as shares of their sum, in nats. As `complexity`."""
    return numbers(evaluated(case, "Complexity", seen(case), case.maps.abs()))


@method(
    "compare",
    "quantus.effective_complexity",
    better="lower",
    cost=NONE,
    paper="Nguyen and Martínez 2020, On Quantitative Aspects of Model Interpretability",
)
def effective_complexity(case: Case, *, eps: float = 0.01) -> Tensor:
    """The number of pixels above `eps` of the largest magnitude. The paper's also asks the model; Quantus' does not."""
    return numbers(evaluated(case, "EffectiveComplexity", seen(case), to_peak(case.maps.abs()), eps=eps))


# -- localisation -----------------------------------------------------------------------------------------------------


@method(
    "compare",
    "quantus.pointing_game",
    better="higher",
    cost=NONE,
    paper="Zhang et al. 2018, Top-Down Neural Attention by Excitation Backprop",
)
def pointing_game(case: Case) -> Tensor:
    """1 where the maximum lies in the mask; of several equal ones any counts, where `pointing` takes the first."""
    return _inside(case, "PointingGame", case.maps)


@method(
    "compare",
    "quantus.attribution_localisation",
    better="higher",
    cost=NONE,
    paper="Kohlbrenner et al. 2020, Towards Best Practice in Explaining Neural Network Decisions with LRP",
)
def attribution_localisation(case: Case) -> Tensor:
    """The share of the positive values inside the mask. As `energy_pointing`."""
    return _inside(case, "AttributionLocalisation", case.maps, positive_attributions=True)


@method("compare", "quantus.relevance_mass_accuracy", better="higher", cost=NONE, paper=ARRAS)
def relevance_mass_accuracy(case: Case) -> Tensor:
    """The share of the magnitudes inside the mask. With signs, as Quantus alone takes it, it may be any number."""
    return _inside(case, "RelevanceMassAccuracy", case.maps.abs())


@method("compare", "quantus.relevance_rank_accuracy", better="higher", cost=NONE, paper=ARRAS)
def relevance_rank_accuracy(case: Case) -> Tensor:
    """The share of the highest pixels, as many as the mask has, that lie in it; r, where `iou` is r / (2 - r)."""
    return _inside(case, "RelevanceRankAccuracy", case.maps)


@method(
    "compare",
    "quantus.top_k_intersection",
    better="higher",
    cost=NONE,
    paper="Theiner et al. 2021, Interpretable Semantic Photo Geolocation",
)
def top_k_intersection(case: Case, *, k: int = 1000) -> Tensor:
    """The share of the `k` highest pixels inside the mask, so at most its size over `k`."""
    pixels = case.maps[0].numel()
    if not 0 < k < pixels:
        raise BadInput(f"k is a number of pixels, fewer than the image's {pixels}; got {k}")
    return _inside(case, "TopKIntersection", case.maps, k=k)


@method("compare", "quantus.auc", better="higher", cost=NONE, paper="Fawcett 2006, An Introduction to ROC Analysis")
def auc(case: Case) -> Tensor:
    """The area under the ROC curve of the mask's pixels, the map being the score of a pixel: 0.5 by chance."""
    return _inside(case, "AUC", case.maps)


def _inside(case: Case, kind: str, maps: Tensor, **options: Any) -> Tensor:
    """NaN where the mask is empty: Quantus' pointing game has a hit there."""
    there = case.truth().flatten(1).any(1)
    return numbers(evaluated(case, kind, seen(case), maps, **options)).where(there, nan)
