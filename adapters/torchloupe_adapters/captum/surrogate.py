"""A linear model of the target, fitted to the image with superpixels left out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchloupe_adapters.captum.asked import asked, attr, one_by_one, segments_of, target_of, tensor_of
from torchloupe_core.baselines import filling
from torchloupe_core.errors import BadInput
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["kernel_shap", "lime"]

LIME_KERNEL_WIDTH = 0.25  # of the cosine distance, as in marcotcr/lime's image explainer
CERTAIN = 1e6  # Captum's weight of the whole image and of none of it, which Kernel SHAP must fit exactly


@method(
    "explain",
    "captum.lime",
    needs=("segments",),
    cost="n_samples (1000) forwards",
    paper="Ribeiro et al. 2016, Why Should I Trust You?",
    random=True,
)
def lime(
    query: Query,
    *,
    n_samples: int = 1000,
    segments: Tensor | None = None,
    n_segments: int = 50,
    baseline: Tensor | float | str | None = None,
) -> Map:
    """The weight of each superpixel in a linear model of the target, fitted to images with superpixels left out.

    segments: `[H, W]` or `[N, H, W]` integers, one number a superpixel; without them SLIC cuts about `n_segments`. The
    fit is a ridge regression weighted by the cosine distance to the whole image. `diagnostics["r2"]` says how
    much of the target's variation it explains, for each image.
    """
    if n_samples < 2:
        raise BadInput(f"lime needs at least 2 samples; got {n_samples}")

    def explainer(score: Any, fit: Any) -> Any:
        return attr().Lime(score, interpretable_model=fit, similarity_func=_cosine_similarity)

    fit = _regression("SkLearnRidge", alpha=1.0)
    values, _, r2 = _fitted(query, explainer, fit, n_samples, segments_of(query, segments, n_segments), baseline)
    return Map(values, diagnostics={"r2": r2})


@method(
    "explain",
    "captum.kernel_shap",
    needs=("segments",),
    cost="n_samples (1000) forwards",
    paper="Lundberg and Lee 2017, A Unified Approach to Interpreting Model Predictions",
    random=True,
)
def kernel_shap(
    query: Query,
    *,
    n_samples: int = 1000,
    segments: Tensor | None = None,
    n_segments: int = 50,
    baseline: Tensor | float | str | None = None,
) -> Map:
    """The Shapley value of each superpixel, estimated from random sets of them.

    The values of all superpixels add up to f(x) - f(baseline). segments, n_segments: as in lime. `diagnostics["r2"]`
    says how much of the target's variation over the sets a sum of superpixels explains, for each image.
    """
    regions = segments_of(query, segments, n_segments)
    counts = [int(one.max()) + 1 for one in regions]
    if min(counts) < 2 or n_samples < max(counts) + 2:
        raise BadInput(
            f"kernel_shap needs at least 2 segments, and 2 samples more than segments; got n_samples {n_samples} for "
            f"{min(counts)} to {max(counts)} segments"
        )

    def explainer(score: Any, fit: Any) -> Any:
        way = attr().KernelShap(score)
        way.interpretable_model = fit
        return way

    values, scores, r2 = _fitted(query, explainer, _regression("SkLearnLinearRegression"), n_samples, regions, baseline)
    return Map(values, scores=scores, diagnostics={"r2": r2})  # the first sample is the whole image


def _fitted(
    query: Query, explainer: Any, fit: Any, n_samples: int, regions: list[Tensor], baseline: Tensor | float | str | None
) -> tuple[Tensor, Tensor, list[float]]:
    """For each image the weights of its segments as a map `[N, H, W]`, the first sample's score, and the fit's R^2."""
    begin = filling(query, baseline).expand(len(query.inputs), *query.shape)
    rest = iter(zip(regions, begin, strict=True))

    def answer(part: Query) -> tuple[Tensor, Tensor, float]:
        region, covered = next(rest)
        kept: list[Tensor] = []
        way = explainer(target_of(part, kept), fit)
        way.from_interp_rep_transform = _covered  # a third of the work of Captum's own
        weights = way.attribute(
            **asked(part),
            baselines=covered[None],
            feature_mask=region[None, None].to(part.inputs.device),
            n_samples=n_samples,
            perturbations_per_eval=part.batch,
        )
        return tensor_of(weights)[:, 0], kept[0][:1], fit.r2()

    values, scores, r2 = zip(*one_by_one(query, answer), strict=True)
    return torch.cat(values), torch.cat(scores), list(r2)


def _covered(kept: Tensor, image: Tensor, *, feature_mask: Tensor, baselines: Tensor, **_: Any) -> Tensor:
    """The image where its superpixels are kept, the baseline elsewhere."""
    shown = kept[0].bool().index_select(0, feature_mask.flatten()).view(feature_mask.shape)
    return torch.where(shown, image, baselines)


def _cosine_similarity(original: Tensor, perturbed: Tensor, kept: Tensor, **_: Any) -> float:
    """How near a sample is to the whole image: a kernel on the cosine distance of what was kept, 0 or 1 each."""
    distance = 1 - kept.float().mean().sqrt().item()
    return math.exp(-((distance / LIME_KERNEL_WIDTH) ** 2))


def _regression(name: str, **options: Any) -> Any:
    """One of Captum's regressions, in double precision on the CPU, which also remembers how well it fits."""
    attr()
    from captum._utils.models import linear_model

    class Regression(getattr(linear_model, name)):  # type: ignore[misc]
        def fit(self, train_data: Any, **more: Any) -> Any:
            self.data = [one.double().cpu() for one in next(iter(train_data))]
            return super().fit([self.data], **more)

        def r2(self) -> float:
            """The weighted share of the target's variance that the linear model explains."""
            kept, value, weight = self.data[0].flatten(1), self.data[1].flatten(), self.data[2].flatten()
            weight = weight.where(weight < CERTAIN, 0.0)
            mean = (weight * value).sum() / weight.sum()
            residual = value - self(kept.to(self.linear.weight.dtype)).double().flatten()
            total = (weight * (value - mean) ** 2).sum()
            return float(1 - (weight * residual**2).sum() / total) if total > 0 else 1.0

    return Regression(**options)
