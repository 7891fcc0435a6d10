"""Captum: gradient, occlusion and surrogate attribution, asked in our target language.

Captum sees one function, "the target's value for these inputs", so every target of ours works with every method of
its. Which image an input belongs to travels as an extra argument, because Captum repeats and reorders inputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe_adapters import skimage
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["guided_backprop", "input_x_gradient", "integrated_gradients", "lime", "occlusion", "saliency"]

LIME_KERNEL_WIDTH = 0.25  # of the cosine distance, as in marcotcr/lime's image explainer


@method(
    "explain",
    "captum.saliency",
    needs=("gradient",),
    cost="1 forward + 1 backward",
    paper="Simonyan et al. 2013, Deep Inside Convolutional Networks, section 3.1",
    signed=False,
)
def saliency(query: Query) -> Map:
    """The largest magnitude of the gradient over the channels; `per_channel` holds the gradient itself."""

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        gradient = _attr().Saliency(_differentiable(part, kept)).attribute(**_asked(part), abs=False)
        return _tensor(gradient), torch.cat(kept)

    gradient, scores = _joined(query.each(answer))
    return Map(gradient.abs().amax(1), gradient, scores=scores)


@method(
    "explain",
    "captum.input_x_gradient",
    needs=("gradient",),
    cost="1 forward + 1 backward",
    paper="Shrikumar et al. 2016, Not Just a Black Box",
)
def input_x_gradient(query: Query) -> Map:
    """The gradient times the input, summed over channels."""

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        product = _attr().InputXGradient(_differentiable(part, kept)).attribute(**_asked(part))
        return _tensor(product), torch.cat(kept)

    product, scores = _joined(query.each(answer))
    return Map(product.sum(1), product, scores=scores)


@method(
    "explain",
    "captum.integrated_gradients",
    needs=("gradient",),
    cost="steps (32) x (forward + backward)",
    paper="Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks",
)
def integrated_gradients(query: Query, *, steps: int = 32, baseline: Tensor | float | None = None) -> Map:
    """The gradient integrated from a baseline to the image, times their difference, summed over channels.

    baseline: a number or `[C, H, W]` in units of the model's input; None is zero, the mean colour of a normalised
    input. `diagnostics["completeness_gap"]` is f(x) - f(baseline) - sum, for each image.
    """
    if steps < 1:
        raise BadInput(f"integrated_gradients needs at least 1 step; got {steps}")
    start = _baseline(query, baseline)

    def answer(part: Query) -> tuple[Tensor, Tensor, Tensor]:
        begin = start.expand(len(part.inputs), -1, -1, -1)
        shares = _tensor(
            _attr()
            .IntegratedGradients(_differentiable(part))
            .attribute(
                **_asked(part),
                baselines=begin,
                n_steps=steps,
                internal_batch_size=max(part.batch, len(part.inputs)),
            )
        )
        scores = part.score(part.inputs)
        return shares, scores, scores - part.score(begin) - shares.flatten(1).sum(1)

    shares, scores, gaps = _joined(query.each(answer))
    return Map(shares.sum(1), shares, scores=scores, diagnostics={"completeness_gap": gaps.tolist()})


@method(
    "explain",
    "captum.guided_backprop",
    needs=("gradient", "relu"),
    cost="1 forward + 1 backward",
    paper="Springenberg et al. 2015, Striving for Simplicity",
    signed=False,
)
def guided_backprop(query: Query) -> Map:
    """The largest magnitude over the channels of the gradient with negative values stopped at every ReLU.

    Its sign says which way to change a pixel, not whether the pixel speaks for the target; `per_channel` has it.

    Captum reaches `torch.nn.ReLU` modules only. A model without any would give the plain gradient under this name, one
    that also rectifies through functions a mixture; both are refused.
    """
    _require_relu_modules(query)
    for part in query.handle.module.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False  # in-place output is a view to autograd's module hooks, which they may not change

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Setting backward hooks on ReLU")
            guided = _attr().GuidedBackprop(_Scored(part, kept)).attribute(**_asked(part))
        return _tensor(guided), torch.cat(kept)

    guided, scores = _joined(query.each(answer))
    return Map(guided.abs().amax(1), guided, scores=scores)


@method(
    "explain",
    "captum.occlusion",
    cost="1 forward for each window position (about 200)",
    paper="Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, section 4.2",
)
def occlusion(
    query: Query, *, window: int | None = None, stride: int | None = None, baseline: Tensor | float | None = None
) -> Map:
    """How much the target falls when a square of the image is covered, averaged over the squares a pixel lies in.

    window, stride: in pixels; 3/16 and 1/16 of the shorter side unless given. baseline: as in integrated gradients.
    """
    shorter = min(query.size)
    window = max(1, round(shorter * 3 / 16)) if window is None else window
    stride = max(1, min(window, round(shorter / 16))) if stride is None else stride
    if not 1 <= window <= shorter or not 1 <= stride <= window:
        raise BadInput(f"occlusion needs 1 <= stride <= window <= {shorter}; got window {window}, stride {stride}")
    channels, start = query.shape[0], _baseline(query, baseline)

    def answer(part: Query) -> Tensor:
        return _tensor(
            _attr()
            .Occlusion(part.score)
            .attribute(
                **_asked(part),
                sliding_window_shapes=(channels, window, window),
                strides=(channels, stride, stride),
                baselines=start.expand(len(part.inputs), -1, -1, -1),
                perturbations_per_eval=max(1, part.batch // len(part.inputs)),
            )
        )

    return Map(torch.cat(query.each(answer))[:, 0])  # a window covers all channels, so they share one value


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
    baseline: Tensor | float | None = None,
) -> Map:
    """The weight of each superpixel in a linear model of the target, fitted to images with superpixels left out.

    segments: `[H, W]` or `[N, H, W]` integers, one number a superpixel; without them SLIC cuts about `n_segments`. The
    fit is a ridge regression weighted by the cosine distance to the whole image. `diagnostics["r2"]` says how
    much of the target's variation it explains, for each image.
    """
    if n_samples < 2:
        raise BadInput(f"lime needs at least 2 samples; got {n_samples}")
    regions = _segments(query, segments, n_segments)
    start, values, scores = _baseline(query, baseline), [], []
    for index in range(len(query.inputs)):
        part = query.only(index, index + 1)
        torch.manual_seed(query.seed)  # captum draws from torch's global generator, which is put back afterwards
        fit = _ridge()
        explained = (
            _attr()
            .Lime(part.score, interpretable_model=fit, similarity_func=_cosine_similarity)
            .attribute(
                **_asked(part),
                baselines=start,
                feature_mask=regions[index][None, None].to(part.inputs.device),
                n_samples=n_samples,
                perturbations_per_eval=part.batch,
            )
        )
        values.append(_tensor(explained)[:, 0])
        scores.append(fit.r2())
        query.progress(index + 1, len(query.inputs))
    return Map(torch.cat(values), diagnostics={"r2": scores})


def _attr() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise MissingDependency.of("captum", None) from error
    return captum.attr


def _tensor(found: Any) -> Tensor:
    tensor: Tensor = found.detach()
    return tensor


def _asked(part: Query) -> dict[str, Any]:
    """The arguments every method of Captum takes: the inputs, and which image each of them belongs to."""
    inputs = part.inputs.detach().requires_grad_(True)  # Captum would set it, and leave it set after an exception
    return {"inputs": inputs, "additional_forward_args": (torch.arange(len(inputs)),)}


def _baseline(query: Query, baseline: Tensor | float | None) -> Tensor:
    """The baseline as `[1, C, H, W]`."""
    filling = torch.as_tensor(0.0 if baseline is None else baseline).to(query.inputs)
    try:
        return filling.expand(1, *query.shape)
    except RuntimeError:
        raise BadInput(f"baseline is a number or [C, H, W] = {list(query.shape)}; got {list(filling.shape)}") from None


def _joined(answers: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What one batch after another gave, put together."""
    return tuple(map(torch.cat, zip(*answers, strict=True)))


def _differentiable(part: Query, kept: list[Tensor] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The target's values, refused where no gradient leads from them to the input; noted in `kept` as they come."""

    def scored(inputs: Tensor, images: Tensor) -> Tensor:
        values = part.score(inputs, images)
        if torch.is_grad_enabled() and inputs.requires_grad and not values.requires_grad:
            raise NotApplicable(
                "the target has no gradient with respect to the input; rise, occlusion and lime need none"
            )
        if kept is not None:
            kept.append(values.detach())
        return values

    return scored


class _Scored(nn.Module):
    """The model with the target as its output, for methods of Captum that want a module."""

    def __init__(self, query: Query, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept
        self.model, self.query = query.handle.module, query

    def forward(self, inputs: Tensor, images: Tensor) -> Tensor:
        return _differentiable(self.query, self.kept)(inputs, images)


def _require_relu_modules(query: Query) -> None:
    trace = query.handle.trace(query.shape)
    modules = sum(layer.kind == "ReLU" for layer in trace.calls.values())
    others = "saliency, input_x_gradient and integrated_gradients work on any model"
    if not modules:
        raise NotApplicable(
            f"this model has no torch.nn.ReLU, so guided_backprop would be the plain gradient; {others}"
        )
    if trace.rectified > modules:
        raise NotApplicable(
            f"this model rectifies {trace.rectified - modules} times through a function, out of captum's reach, so "
            f"guided_backprop would mix two gradients; {others}"
        )


def _segments(query: Query, segments: Tensor | None, n_segments: int) -> list[Tensor]:
    """For each image the superpixel of every pixel, `[H, W]`, numbered from 0."""
    if segments is None:
        return [skimage.slic(image, n_segments) for image in query.handle.spec.display(query.inputs)]
    given = torch.as_tensor(segments)
    given = given.expand(len(query.inputs), *given.shape) if given.ndim == 2 else given
    expected = (len(query.inputs), *query.size)
    if tuple(given.shape) != expected or given.is_floating_point():
        raise BadInput(f"segments are integers [H, W] or [N, H, W] = {list(expected)}; got {list(given.shape)}")
    return [one.unique(return_inverse=True)[1].view(query.size) for one in given]


def _cosine_similarity(original: Tensor, perturbed: Tensor, kept: Tensor, **_: Any) -> float:
    """How near a sample is to the whole image: a kernel on the cosine distance of what was kept, 0 or 1 each."""
    distance = 1 - kept.float().mean().sqrt().item()
    return math.exp(-((distance / LIME_KERNEL_WIDTH) ** 2))


def _ridge() -> Any:
    """Captum's ridge regression, which also remembers how well it fits."""
    from captum._utils.models.linear_model import SkLearnRidge

    class Ridge(SkLearnRidge):  # type: ignore[misc]
        def fit(self, train_data: Any, **options: Any) -> Any:
            self.data = next(iter(train_data))
            return super().fit(train_data, **options)

        def r2(self) -> float:
            """The weighted share of the target's variance that the linear model explains."""
            kept, value, weight = (one.double().flatten(1) if one.ndim > 1 else one.double() for one in self.data)
            value, weight = value.flatten(), weight.flatten()
            mean = (weight * value).sum() / weight.sum()
            residual = value - self(kept.to(self.linear.weight.dtype)).double().flatten()
            total = (weight * (value - mean) ** 2).sum()
            return float(1 - (weight * residual**2).sum() / total) if total > 0 else 1.0

    return Ridge(alpha=1.0)
