"""Quantus' metrics of robustness: the method is asked about images that are almost the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchloupe_adapters.quantus.asked import Sight, asked_again, evaluated, numbers, seen, values_of
from torchloupe_core.errors import BadInput
from torchloupe_core.metrics.case import FEW, Case, of_first
from torchloupe_core.registry import method

__all__ = [
    "avg_sensitivity",
    "local_lipschitz_estimate",
    "max_sensitivity",
    "relative_input_stability",
    "relative_output_stability",
]

ASKED = "the method 5 times, of 16 images"

ALVAREZ = "Alvarez-Melis and Jaakkola 2018, On the Robustness of Interpretability Methods"
YEH = "Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations"
AGARWAL = "Agarwal et al. 2022, Rethinking Stability for Attribution-based Explanations"


@method("compare", "quantus.local_lipschitz_estimate", better="lower", cost=ASKED, paper=ALVAREZ, random=True)
def local_lipschitz_estimate(case: Case, *, spread: float = 0.02, n_samples: int = 5, images: int = FEW) -> Tensor:
    """The largest change of the map, of its own norm, over that of the input, under Gaussian noise.

    spread: the noise's standard deviation, in units of the model's input; n_samples: how often it is drawn. Of the
    first images.
    """
    return _steadiness(
        case,
        "LocalLipschitzEstimate",
        images,
        n_samples,
        spread,
        of_norm=True,
        nr_samples=n_samples,
        perturb_std=spread,
    )


@method("compare", "quantus.max_sensitivity", better="lower", cost=ASKED, paper=YEH, random=True)
def max_sensitivity(case: Case, *, radius: float = 0.02, n_samples: int = 5, images: int = FEW) -> Tensor:
    """The largest change of the map, of its own norm, under small random changes of the input. Of the first images.

    radius: of those changes, for each number of the input; n_samples: how many there are.
    """
    return _steadiness(case, "MaxSensitivity", images, n_samples, radius, nr_samples=n_samples, lower_bound=radius)


@method("compare", "quantus.avg_sensitivity", better="lower", cost=ASKED, paper=YEH, random=True)
def avg_sensitivity(case: Case, *, radius: float = 0.02, n_samples: int = 5, images: int = FEW) -> Tensor:
    """As quantus.max_sensitivity, the mean change in place of the largest."""
    return _steadiness(case, "AvgSensitivity", images, n_samples, radius, nr_samples=n_samples, lower_bound=radius)


@method("compare", "quantus.relative_input_stability", better="lower", cost=ASKED, paper=AGARWAL, random=True)
def relative_input_stability(case: Case, *, radius: float = 0.02, n_samples: int = 5, images: int = FEW) -> Tensor:
    """The largest change of the map over that of the input, each number's change being of that number.

    So it is ruled by the numbers near zero, of the map above all: a smooth map may have a huge value. Options as in
    quantus.max_sensitivity. Quantus alone makes the input only brighter.
    """
    return _steadiness(
        case, "RelativeInputStability", images, n_samples, radius, nr_samples=n_samples, **_evenly(radius)
    )


@method("compare", "quantus.relative_output_stability", better="lower", cost=ASKED, paper=AGARWAL, random=True)
def relative_output_stability(case: Case, *, radius: float = 0.02, n_samples: int = 5, images: int = FEW) -> Tensor:
    """The largest change of the map, each number's of that number, over the norm of the outputs' change.

    As quantus.relative_input_stability, ruled by numbers near zero.
    """
    return _steadiness(
        case,
        "RelativeOutputStability",
        images,
        n_samples,
        radius,
        outputs=True,
        nr_samples=n_samples,
        **_evenly(radius),
    )


def _steadiness(
    case: Case,
    kind: str,
    images: int,
    n_samples: int,
    size: float,
    *,
    of_norm: bool = False,
    outputs: bool = False,
    **options: Any,
) -> Tensor:
    """A metric of the maps of an image and of its variants. of_norm: maps are in units of the first one's norm."""
    if n_samples < 1 or not size > 0:
        raise BadInput(f"n_samples is at least 1 and the size of changes above 0; got {n_samples}, {size}")

    def judge(part: Case, _: object) -> Tensor:
        unit = part.maps.flatten(1).norm(dim=1) if of_norm else part.maps.abs().flatten(1).amax(1)
        sight = Sight(part.query.inputs, lambda x: values_of(part, x)) if outputs else seen(part)

        def scaled(maps: Tensor) -> Tensor:
            return maps / unit.clamp(min=1e-30)[:, None, None]

        again = asked_again(part, scaled)
        found = evaluated(
            part, kind, sight, scaled(part.maps), again=again, return_nan_when_prediction_changes=False, **options
        )
        return numbers(found)

    return of_first(case, images, judge)


def _evenly(radius: float) -> dict[str, Any]:
    return {"perturb_func_kwargs": {"lower_bound": radius, "upper_bound": None}}
