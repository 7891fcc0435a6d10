"""Gradients: once, along a path from a baseline, averaged over noise or over samples."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_adapters.captum.asked import (
    asked,
    attr,
    each_from,
    in_batches,
    joined,
    one_by_one,
    target_of,
    tensor_of,
)
from torchloupe_core.baselines import filling
from torchloupe_core.errors import BadInput
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["gradient_shap", "input_x_gradient", "integrated_gradients", "saliency", "smooth_grad", "var_grad"]

GRADIENT, NOISY = "gradient at the input", "gradients at noisy inputs"


@method(
    "explain",
    "captum.saliency",
    needs=("gradient",),
    cost="1 forward + 1 backward",
    paper="Simonyan et al. 2013, Deep Inside Convolutional Networks, section 3.1",
    signed=False,
    shares=GRADIENT,
)
def saliency(query: Query) -> Map:
    """The largest magnitude of the gradient over the channels; `per_channel` holds the gradient itself."""
    gradient, scores = _gradient(query)
    return Map(gradient.abs().amax(1), gradient, scores=scores)


@method(
    "explain",
    "captum.input_x_gradient",
    needs=("gradient",),
    cost="1 forward + 1 backward",
    paper="Shrikumar et al. 2016, Not Just a Black Box",
    shares=GRADIENT,
)
def input_x_gradient(query: Query) -> Map:
    """The gradient times the input, summed over channels."""
    gradient, scores = _gradient(query)
    product = gradient * query.inputs
    return Map(product.sum(1), product, scores=scores)


def _gradient(query: Query) -> tuple[Tensor, ...]:
    """The gradient at the inputs `[N, C, H, W]` and the scores `[N]`."""

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        gradient = attr().Saliency(target_of(part, kept)).attribute(**asked(part), abs=False)
        return tensor_of(gradient), torch.cat(kept)

    return query.once(GRADIENT, query.inputs, lambda: joined(query.each(answer)))


@method(
    "explain",
    "captum.integrated_gradients",
    needs=("gradient",),
    cost="steps (32) x (forward + backward)",
    paper="Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks",
)
def integrated_gradients(query: Query, *, steps: int = 32, baseline: Tensor | float | str | None = None) -> Map:
    """The gradient integrated from a baseline to the image, times their difference, summed over channels.

    baseline: a number or `[C, H, W]` in units of the model's input; None is zero, the mean colour of a normalised
    input. `diagnostics["completeness_gap"]` is f(x) - f(baseline) - sum, for each image.
    """
    if steps < 1:
        raise BadInput(f"integrated_gradients needs at least 1 step; got {steps}")

    def answer(part: Query, begin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shares = tensor_of(
            attr()
            .IntegratedGradients(target_of(part))
            .attribute(
                **asked(part),
                baselines=begin,
                n_steps=steps,
                internal_batch_size=max(part.batch, len(part.inputs)),
            )
        )
        scores = part.score(part.inputs)
        return shares, scores, scores - part.score(begin) - shares.flatten(1).sum(1)

    shares, scores, gaps = joined(each_from(query, baseline, answer))
    return Map(shares.sum(1), shares, scores=scores, diagnostics={"completeness_gap": gaps.tolist()})


@method(
    "explain",
    "captum.smooth_grad",
    needs=("gradient",),
    cost="n_samples (25) x (forward + backward)",
    paper="Smilkov et al. 2017, SmoothGrad: removing noise by adding noise",
    random=True,
    signed=False,
    shares=NOISY,
)
def smooth_grad(query: Query, *, n_samples: int = 25, noise: float = 0.15) -> Map:
    """The largest magnitude over the channels of the gradient's mean over noisy copies of the image.

    noise: its standard deviation as a share of the image's range, largest less smallest value. `per_channel` holds the
    mean gradient itself. All images get the same noise, scaled to their range.
    """
    mean = _tunnelled(query, "smoothgrad", n_samples, noise)
    return Map(mean.abs().amax(1), mean)


@method(
    "explain",
    "captum.var_grad",
    needs=("gradient",),
    cost="n_samples (25) x (forward + backward)",
    paper="Adebayo et al. 2018, Local Explanation Methods for Deep Neural Networks",
    random=True,
    signed=False,
    shares=NOISY,
)
def var_grad(query: Query, *, n_samples: int = 25, noise: float = 0.15) -> Map:
    """The largest variance over the channels of the gradient over noisy copies of the image.

    noise: as in smooth_grad. `per_channel` holds the variance of each channel, the mean square deviation from the mean.
    """
    if n_samples < 2:
        raise BadInput(f"var_grad needs at least 2 samples; got {n_samples}")
    variance = _tunnelled(query, "vargrad", n_samples, noise).clamp(min=0)  # a difference of squares, which may round
    return Map(variance.amax(1), variance)


def _tunnelled(query: Query, kind: str, n_samples: int, noise: float) -> Tensor:
    """A statistic of the gradient `[N, C, H, W]` over noisy copies of each image."""
    if n_samples < 1 or noise <= 0:
        raise BadInput(f"noise is above 0 and n_samples at least 1; got noise {noise}, n_samples {n_samples}")

    def answer(part: Query) -> Tensor:
        spread = float(part.inputs.max() - part.inputs.min()) * noise
        tunnel = attr().NoiseTunnel(attr().Saliency(in_batches(part)))
        return tensor_of(tunnel.attribute(**asked(part), nt_type=kind, nt_samples=n_samples, stdevs=spread, abs=False))

    return torch.cat(one_by_one(query, answer))


@method(
    "explain",
    "captum.gradient_shap",
    needs=("gradient",),
    cost="n_samples (50) x (forward + backward)",
    paper="Lundberg and Lee 2017, A Unified Approach to Interpreting Model Predictions; expected gradients, Erion 2019",
    random=True,
)
def gradient_shap(query: Query, *, n_samples: int = 50, baseline: Tensor | float | str | None = None) -> Map:
    """The gradient at random points between image and baseline, times their difference, averaged, summed over channels.

    baseline: as in integrated gradients, or `[M, C, H, W]`, a set from which each sample draws one.
    `diagnostics["completeness_gap"]` is f(x) - mean f(baseline) - sum, zero in expectation.
    """
    if n_samples < 1:
        raise BadInput(f"gradient_shap needs at least 1 sample; got {n_samples}")

    def answer(part: Query) -> tuple[Tensor, Tensor, Tensor]:
        choice = _baseline_set(part, baseline)
        explainer = attr().GradientShap(in_batches(part))
        shares = tensor_of(explainer.attribute(**asked(part), baselines=choice, n_samples=n_samples))
        points = torch.cat([part.inputs, choice])
        runs = part.pace.run(len(points), lambda start, stop: part.score(points[start:stop], [0] * (stop - start)))
        scores = torch.cat([values for _, _, values in runs])
        return shares, scores[:1], scores[:1] - scores[1:].mean() - shares.sum()

    shares, scores, gaps = joined(one_by_one(query, answer))
    return Map(shares.sum(1), shares, scores=scores, diagnostics={"completeness_gap": gaps.tolist()})


def _baseline_set(part: Query, baseline: Tensor | float | str | None) -> Tensor:
    """What one image's baselines are drawn from, `[M, C, H, W]`."""
    if not isinstance(baseline, Tensor) or baseline.ndim != 4:
        return filling(part, baseline)
    if not len(baseline) or tuple(baseline.shape[1:]) != part.shape:
        raise BadInput(f"a set of baselines is [M, C, H, W] with C, H, W = {part.shape}; got {list(baseline.shape)}")
    return baseline.detach().to(part.inputs)
