"""captum's own metrics of a map: infidelity, and sensitivity to small changes of the input."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.borrow import kept_randomness
from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.metrics.case import FEW, Again, Case, of_first
from torchloupe_core.registry import method

__all__ = ["infidelity", "max_sensitivity"]


@method(
    "compare",
    "captum.infidelity",
    better="lower",
    any_scale=True,
    cost="forwards: 2 for each of 20 samples",
    paper="Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations",
    random=True,
)
def infidelity(case: Case, *, n_samples: int = 20, spread: float = 0.1) -> Tensor:
    """How far the map, at its best scale, is from telling what Gaussian noise on the input does to what it explains.

    Of a logit that is the logit: a probability near 1 hardly moves, whatever the map. spread: the noise's standard
    deviation, in units of the model's input. A map without a share for each channel counts for all channels alike.
    """
    if n_samples < 1 or not spread > 0:
        raise BadInput(f"n_samples is at least 1 and spread above 0; got {n_samples}, {spread}")
    inputs, query = case.query.inputs, case.asked
    # The noise is the same for every method, so the model is asked once.
    seen: list[Tensor] = case.shared.setdefault(("captum.infidelity", n_samples, spread), [])
    batch = case.shared.setdefault("batch of captum.infidelity", query.batch)
    calls = count()
    shares = case.maps[:, None].expand(inputs.shape) / inputs.shape[1] if case.attributed is None else case.attributed

    def perturbed(images: Tensor) -> tuple[Tensor, Tensor]:
        noise = spread * torch.randn_like(images)
        return noise, images - noise

    def scored(images: Tensor, which: Tensor) -> Tensor:
        call = next(calls)
        if call == len(seen):
            seen.append(query.score(images, which))
        return seen[call]

    with kept_randomness():
        torch.manual_seed(query.seed)
        found: Tensor = _metrics().infidelity(
            scored,
            perturbed,
            inputs,
            shares.to(inputs),
            additional_forward_args=(torch.arange(len(inputs)),),
            n_perturb_samples=n_samples,
            max_examples_per_batch=len(inputs) * max(1, min(n_samples, batch // len(inputs))),
            normalize=True,
        )
    return found.detach().float().cpu()


@method(
    "compare",
    "captum.max_sensitivity",
    better="lower",
    cost="the method 5 times, of 16 images",
    paper="Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations",
    random=True,
)
def max_sensitivity(case: Case, *, radius: float = 0.02, n_samples: int = 5, images: int = FEW) -> Tensor:
    """The largest change of the map, of its own norm, under small random changes of the input. Of the first images.

    radius: of those changes, for each number of the input; n_samples: how many there are.
    """
    if n_samples < 1 or not radius > 0:
        raise BadInput(f"n_samples is at least 1 and radius above 0; got {n_samples}, {radius}")

    def judge(part: Case, again: Again) -> Tensor:
        def explained(variants: tuple[Tensor]) -> tuple[Tensor]:
            each = len(variants[0]) // len(part)  # of an image, one after the other
            return (again(variants[0].detach(), [place // each for place in range(len(variants[0]))]),)

        with kept_randomness():
            torch.manual_seed(case.query.seed)
            found: Tensor = _metrics().sensitivity_max(
                explained,
                part.query.inputs,
                perturb_radius=radius,
                n_perturb_samples=n_samples,
                max_examples_per_batch=len(part),
            )
        return found.detach().float().cpu()

    return of_first(case, images, judge)


def _metrics() -> Any:
    try:
        import captum.metrics
    except ImportError as error:
        raise MissingDependency.of("captum", None) from error
    return captum.metrics
