"""Class activation maps from one forward pass: CAM, Grad-CAM and its relatives, Eigen-CAM.

Raw and signed, at the layer's resolution: no ReLU, no normalisation, no resizing. On a model with average pooling and a
linear head Grad-CAM, XGrad-CAM and HiResCAM are CAM divided by the number of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Reading, pick
from torchloupe_core.layout import to_map
from torchloupe_core.query import Map, Query, finite
from torchloupe_core.registry import method
from torchloupe_core.targets import Bound
from torchloupe_core.watch import Place

__all__ = [
    "cam",
    "eigen_cam",
    "grad_cam",
    "grad_cam_plus_plus",
    "gradient_at",
    "hires_cam",
    "layer_cam",
    "layer_gradient",
    "other_layer",
    "xgrad_cam",
]

HEAD = "1 forward + backward of the head"
SHARED = "gradient at a layer"

IDENTITY_TOLERANCE = 1e-3  # relative to the largest logit; float32 sums over 7x7x2048 stay below 1e-5


@method(
    "explain",
    "cam",
    needs=("pooled_linear", "layer"),
    cost="1 forward",
    paper="Zhou et al. 2016, Learning Deep Features for Discriminative Localization",
)
def cam(query: Query) -> Map:
    """`CAM_c = sum_k w_ck A_k`; its mean over positions plus the bias is the logit, and that is verified each time."""
    asked = {bound: _asked(bound) for bound in query.targets}
    entrance = query.handle.embedding_at(query.shape)
    classifier = _classifier(query, entrance)
    weights = {bound: _weights(chosen, classifier) for bound, chosen in asked.items()}
    layer = query.resolved_layer()

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        with query.handle.watch(layer, entrance, through=True, shape=query.shape) as watch:
            reading = Reading(query.handle, watch, watch(part.inputs))
            features = reading.map(layer)
        _verify(classifier, layer, features, watch[entrance], reading.logits())
        chosen = torch.stack([weights[bound] for bound in part.targets])  # [N, C]
        return _weighted(chosen, features), finite(pick(reading, part.targets))

    return _joined(query.each(answer), layer)


@method(
    "explain",
    "grad_cam",
    needs=("layer", "gradient"),
    cost=HEAD,
    shares=SHARED,
    paper="Selvaraju et al. 2017, Grad-CAM, eq. 1 and 2, before the ReLU",
)
def grad_cam(query: Query) -> Map:
    """`sum_k mean_hw(d target / d A_k) A_k`. Only what follows the layer is differentiated."""
    return _from_gradients(query, lambda features, gradients: _weighted(gradients.mean((2, 3)), features))


@method(
    "explain",
    "grad_cam++",
    needs=("layer", "gradient"),
    cost=HEAD,
    shares=SHARED,
    paper="Chattopadhay et al. 2018, Grad-CAM++, of the exponential of the target",
)
def grad_cam_plus_plus(query: Query) -> Map:
    """`sum_k w_k A_k` with `w_k = sum_hw alpha_k relu(g_k)`, `alpha_k = g_k^2 / (2 g_k^2 + g_k^3 sum_hw A_k)`."""

    def combine(features: Tensor, gradients: Tensor) -> Tensor:
        square = gradients.square()
        below = 2 * square + square * gradients * features.sum((2, 3), keepdim=True)
        alpha = torch.where(below != 0, square / below.where(below != 0, 1.0), 0.0)
        return _weighted((alpha * gradients.relu()).sum((2, 3)), features)

    return _from_gradients(query, combine)


@method(
    "explain",
    "xgrad_cam",
    needs=("layer", "gradient"),
    cost=HEAD,
    shares=SHARED,
    paper="Fu et al. 2020, Axiom-based Grad-CAM",
)
def xgrad_cam(query: Query) -> Map:
    """`sum_k w_k A_k` with `w_k = sum_hw g_k A_k / sum_hw A_k`: the gradient, averaged where the channel is active."""

    def combine(features: Tensor, gradients: Tensor) -> Tensor:
        total = features.sum((2, 3))
        share = (gradients * features).sum((2, 3)) / total.where(total != 0, 1.0)
        return _weighted(share.where(total != 0, 0.0), features)

    return _from_gradients(query, combine)


@method(
    "explain",
    "hires_cam",
    needs=("layer", "gradient"),
    cost=HEAD,
    shares=SHARED,
    paper="Draelos and Carin 2020, Use HiResCAM instead of Grad-CAM",
)
def hires_cam(query: Query) -> Map:
    """`sum_k g_k A_k`: the gradient of each position, not its mean."""
    return _from_gradients(query, lambda features, gradients: (gradients * features).sum(1))


@method(
    "explain",
    "layer_cam",
    needs=("layer", "gradient"),
    cost=HEAD,
    shares=SHARED,
    paper="Jiang et al. 2021, LayerCAM",
)
def layer_cam(query: Query) -> Map:
    """`sum_k relu(g_k) A_k`; made for layers well before the last one."""
    return _from_gradients(query, lambda features, gradients: (gradients.relu() * features).sum(1))


@method(
    "explain",
    "eigen_cam",
    needs=("layer",),
    cost="1 forward",
    paper="Muhammad and Yeasin 2020, Eigen-CAM",
)
def eigen_cam(query: Query) -> Map:
    """The features' projection on their first principal direction. It knows no target: the map is the same for all.

    A direction has no sign; the one is taken along which the features are larger in sum.
    """
    layer = query.resolved_layer()
    names = dict.fromkeys(name for bound in query.targets for name in bound.target.layers)

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        with query.handle.watch(layer, *names, through=True, shape=query.shape) as watch:
            reading = Reading(query.handle, watch, watch(part.inputs))
            features = watch.map(layer).flatten(2).transpose(1, 2)  # [N, h*w, C]
            scores = finite(pick(reading, part.targets))
        exact = features.to(torch.promote_types(features.dtype, torch.float32))
        _, _, directions = torch.linalg.svd(exact - exact.mean(1, keepdim=True), full_matrices=False)
        projected = (exact @ directions[:, 0, :, None])[..., 0]  # [N, h*w]
        projected = projected * torch.where(projected.sum(1, keepdim=True) < 0, -1.0, 1.0)
        return projected.unflatten(1, watch.map(layer).shape[2:]), scores

    return _joined(query.each(answer), layer)


def _from_gradients(query: Query, combine: Callable[[Tensor, Tensor], Tensor]) -> Map:
    """The map `combine` makes of a layer's features and the target's gradient there, both `[N, C, h, w]`."""
    layer = query.resolved_layer()

    def answer(found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        features, gradients, scores = found
        return combine(features, gradients), scores

    return _joined(query.each_of((SHARED, layer), partial(layer_gradient, layer=layer), answer), layer)


def _joined(answers: Sequence[tuple[Tensor, Tensor]], layer: str) -> Map:
    """The maps and scores of one batch after another."""
    maps, scores = zip(*answers, strict=True)
    return Map(torch.cat(maps), layer=layer, scores=torch.cat(scores))


def _weighted(weights: Tensor, features: Tensor) -> Tensor:
    """`sum_k w_k A_k` of weights `[N, C]` and features `[N, C, h, w]`."""
    return torch.einsum("nchw,nc->nhw", features, weights)


def layer_gradient(query: Query, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's map `[N, C, h, w]`, the gradient of each image's target with respect to it, the targets' values."""
    scores, raw, reading = query.with_leaf(layer)
    return reading.map(layer).detach(), gradient_at(query, layer, scores, raw), scores.detach()


def gradient_at(query: Query, layer: str, scores: Tensor, raw: Tensor, *, keep_graph: bool = False) -> Tensor:
    """The gradient of the scores with respect to a layer's raw tensor, as a map `[N, C, h, w]`."""
    if not scores.requires_grad:
        raise NotApplicable(f"the target does not depend on layer {layer!r}; {other_layer(query, layer)}")
    with torch.enable_grad():
        kept = True if keep_graph else None
        (gradient,) = torch.autograd.grad(scores.sum(), raw, allow_unused=True, retain_graph=kept)
    layout = query.handle.layer(layer, query.shape).layout
    if gradient is None or layout is None:
        raise NotApplicable(f"the target does not depend on layer {layer!r}; {other_layer(query, layer)}")
    patches = to_map(gradient, layout)
    if layout.prefix and not patches.any() and gradient.any():
        raise NotApplicable(
            f"after {layer!r} only the class token counts, so its patches have no gradient; {other_layer(query, layer)}"
        )
    return patches


def other_layer(query: Query, failed: str) -> str:
    """What to say of a layer without a gradient: which one would work."""
    first = [name for bound in query.targets for name in bound.target.layers]
    other = query.handle.features_at(query.shape, first[0] if first else None)
    return f"layer={other!r} would work" if other != failed else "name another with layer="


def _classifier(query: Query, entrance: str) -> nn.Linear | nn.Conv2d:
    """The linear layer that gives the logits."""
    module = query.handle.module.get_submodule(Place.parse(entrance).module)
    if not isinstance(module, nn.Linear) and not (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
        raise NotApplicable(f"CAM needs a linear classifier; this model ends in {type(module).__name__}. Use grad_cam")
    return module


def _asked(bound: Bound) -> dict[int, float]:
    """The weight of each class in a sum of logits."""
    if bound.logit_weights is None:
        raise NotApplicable(f"CAM explains sums of logits only, not {bound.target}; use grad_cam")
    return bound.logit_weights


def _weights(chosen: dict[int, float], classifier: nn.Linear | nn.Conv2d) -> Tensor:
    """The classifier's weights `[C]` for a sum of logits."""
    rows = classifier.weight.flatten(1)[list(chosen)]  # [K, C]
    return torch.tensor(list(chosen.values())).to(rows) @ rows


def _verify(classifier: nn.Linear | nn.Conv2d, layer: str, features: Tensor, entered: Tensor, logits: Tensor) -> None:
    """CAM is exact if the classifier reads the mean of the features and gives the logits; otherwise it is another
    method under CAM's name."""
    pooled, entered = features.mean((2, 3)), entered.mean((2, 3)) if entered.ndim == 4 else entered
    if pooled.shape != entered.shape:
        raise NotApplicable(
            f"CAM needs pooling and then the classifier right after the features; {layer!r} has {pooled.shape[1]} "
            f"channels, the classifier reads {list(entered.shape[1:])}. Use grad_cam"
        )
    expected = nn.functional.linear(pooled, classifier.weight.flatten(1), classifier.bias)
    if expected.shape != logits.shape:
        raise NotApplicable("CAM needs the classifier's output to be the model's; here more follows it. Use grad_cam")
    for what, found, exact in (("features", entered, pooled), ("logits", logits, expected)):
        gap = (found - exact).abs().max().item()
        if gap > IDENTITY_TOLERANCE * max(found.abs().max().item(), 1e-6):
            raise NotApplicable(
                f"CAM is exact only if nothing but average pooling lies between {layer!r} and the classifier; here the "
                f"{what} differ by {gap:.2g} from that. Use grad_cam"
            )
