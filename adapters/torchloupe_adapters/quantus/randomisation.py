"""Quantus' metrics of randomisation: the method is asked about another model, or another target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchloupe_adapters.quantus.asked import Sight, asked_again, evaluated, library, numbers, seen
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.metrics.alike import ssim
from torchloupe_core.metrics.case import FEW, Again, Case, of_first
from torchloupe_core.registry import method

__all__ = ["efficient_mprt", "mprt", "random_logit"]


@method(
    "compare",
    "quantus.mprt",
    better="lower",
    cost="the method once for each layer with parameters, of 16 images",
    paper="Adebayo et al. 2018, Sanity Checks for Saliency Maps (cascading)",
    random=True,
)
def mprt(case: Case, *, layer_order: str = "top_down", images: int = FEW) -> Tensor:
    """How alike the maps stay as the layers are drawn anew: the rank correlation of magnitudes, the mean over layers.

    layer_order: "top_down" or "bottom_up", one after the other in the order in which the model holds them, or
    "independent", each by itself. Layers are those with a `reset_parameters`, which of a normalisation forgets what it
    has seen as well; others stay. Of the first images. Quantus alone counts the model as it is among the layers.
    """
    if layer_order not in ("top_down", "bottom_up", "independent"):
        raise BadInput(f'layer_order is "top_down", "bottom_up" or "independent"; got {layer_order!r}')
    options = {"layer_order": layer_order, "similarity_func": _rank_correlations}

    def judge(part: Case, _: object) -> Tensor:
        found = _drawn_anew(part, "MPRT", torch.abs, **options)
        layers = [alike for name, alike in found.items() if name != "original"]
        return numbers(layers).nan_to_num(0.0).mean(0)  # a constant map has nothing of the other

    return of_first(case, images, judge)


@method(
    "compare",
    "quantus.efficient_mprt",
    better="higher",
    cost="the method once, of 16 images",
    paper="Hedström et al. 2024, Sanity Checks Revisited (efficient MPRT)",
    random=True,
)
def efficient_mprt(case: Case, *, images: int = FEW) -> Tensor:
    """By which share the map's entropy, of a histogram of 100 bins, rises once all layers are drawn anew.

    Layers as in quantus.mprt. Of the first images.
    """
    return of_first(case, images, lambda part, _: numbers(_drawn_anew(part, "EfficientMPRT", lambda maps: maps)))


@method(
    "compare",
    "quantus.random_logit",
    better="lower",
    cost="the method once, of 16 images",
    paper="Sixt et al. 2020, When Explanations Lie: Why Many Modified BP Attributions Fail",
    random=True,
)
def random_logit(case: Case, *, images: int = FEW) -> Tensor:
    """How alike the maps of two targets are, an image's own and one of another image's: their structural similarity.

    Of the first images, which must not all have one target. Quantus alone compares the rows of maps, one after another
    as one line, and scales both alike.
    """
    return of_first(case, images, _of_two_targets)


def _of_two_targets(part: Case, again: Again) -> Tensor:
    targets = [str(bound.target) for bound in part.query.targets]
    known = list(dict.fromkeys(targets))
    if len(known) < 2:
        raise NotApplicable(f"all images have the target {known[0]}, so there is no other to ask for")
    asked = [targets.index(one) for one in known]

    def alike(a: Any, b: Any, **_: object) -> Any:
        return ssim(*(torch.from_numpy(one).view(part.maps.shape) for one in (a, b))).tolist()

    found = evaluated(
        part,
        "RandomLogit",
        seen(part),
        part.maps,
        classes=[known.index(one) for one in targets],
        again=lambda inputs, chosen, _: again(inputs, [asked[one] for one in chosen]),
        num_classes=len(known),
        seed=part.query.seed % 2**32,
        similarity_func=alike,
    )
    return numbers(found)


def _drawn_anew(part: Case, kind: str, form: Callable[[Tensor], Tensor], **options: Any) -> Any:
    again = asked_again(part, form)
    if not any(hasattr(one, "reset_parameters") for one in part.query.handle.module.modules()):
        raise NotApplicable("no layer of this model has a reset_parameters; metric randomisation draws any anew")
    sight = Sight(part.query.inputs, lambda x: torch.ones(len(x), 1))  # whose entropy Quantus asks for, and drops
    return evaluated(part, kind, sight, form(part.maps), again=again, layers=True, seed=part.query.seed, **options)


def _rank_correlations(a: Any, b: Any, **_: object) -> Any:
    """`[N]`: Quantus' own for one pair at a time; all at once, one constant map leaves none."""
    return np.array(list(map(library().functions.similarity_func.correlation_spearman, a, b)))
