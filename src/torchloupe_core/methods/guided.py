"""Guided Grad-CAM: where the target looks, times what there it looks at, from one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Reading, pick
from torchloupe_core.methods.cam import gradient_at
from torchloupe_core.query import Map, Query, finite
from torchloupe_core.registry import method

__all__ = ["Guidance", "guided_grad_cam"]

RECTIFIERS = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})  # modules call them too


@method(
    "explain",
    "guided_grad_cam",
    needs=("layer", "gradient", "rectified"),
    cost="1 forward + 1 backward + backward of the head",
    paper="Selvaraju et al. 2017, Grad-CAM, with Springenberg et al. 2015",
    signed=False,
)
def guided_grad_cam(query: Query) -> Map:
    """The largest magnitude over the channels of guided backpropagation times Grad-CAM, rectified and enlarged.

    `per_channel` holds the product itself. Enlarged bilinearly, as the paper does; Captum's default is nearest. The
    gradient at the layer is the plain one, the gradient at the input the guided one, both through the same graph; ReLU
    functions are guided as ReLU modules are.
    """
    if not query.handle.trace(query.shape).rectified:
        raise NotApplicable("this model has no ReLU, so guided_grad_cam would be saliency times grad_cam; use those")
    layer = query.resolved_layer()

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        return _guided(part, layer)

    products, scores = zip(*query.each(answer), strict=True)
    product = torch.cat(products)
    return Map(product.abs().amax(1), product, layer=layer, scores=torch.cat(scores))


def _guided(part: Query, layer: str) -> tuple[Tensor, Tensor]:
    """The product `[N, C, H, W]` and the scores `[N]`."""
    inputs = part.inputs.detach().requires_grad_(True)
    names = dict.fromkeys((layer, *(name for bound in part.targets for name in bound.target.layers)))
    through = any(bound.target.reads_output for bound in part.targets)
    guidance = Guidance()
    with part.handle.watch(*names, through=through, shape=part.shape) as watch, torch.enable_grad(), guidance:
        reading = Reading(part.handle, watch, watch(inputs))
        scores = finite(pick(reading, part.targets))
    gradients = gradient_at(part, layer, scores, watch[layer], keep_graph=True)
    weights = gradients.mean((2, 3), keepdim=True)
    cam = (weights * reading.map(layer).detach()).sum(1, keepdim=True).relu()  # [N, 1, h, w]
    guidance.on = True
    (guided,) = torch.autograd.grad(scores, inputs, torch.ones_like(scores))
    return guided * F.interpolate(cam, part.size, mode="bilinear", align_corners=False), scores.detach()


class Guidance(TorchFunctionMode):
    """Inside, every ReLU passes the ordinary gradient back, or once `on` its positive part (Springenberg 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RECTIFIERS:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        in_place = func.__name__.endswith("_") or kwargs.get("inplace", len(args) > 1 and args[1])
        return _GuidedReLU.apply(x, self, in_place)


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, guidance: Guidance, in_place: bool) -> Tensor:
        if in_place:
            ctx.mark_dirty(x)
        rectified = x.relu_() if in_place else x.relu()
        ctx.save_for_backward(rectified)
        ctx.guidance = guidance
        return rectified

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        (rectified,) = ctx.saved_tensors
        passed = given.clamp(min=0) if ctx.guidance.on else given
        return passed * (rectified > 0), None, None
