"""Grad-CAM as Captum computes it, where its axes are the layer's."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_adapters.captum.asked import Scored, asked, attr, joined, tensor_of
from torchloupe_core.errors import NotApplicable
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method
from torchloupe_core.watch import Place

__all__ = ["grad_cam"]


@method(
    "explain",
    "captum.grad_cam",
    needs=("layer", "gradient", "nchw"),
    cost="1 forward + backward of the head",
    paper="Selvaraju et al. 2017, Grad-CAM, eq. 1 and 2, before the ReLU",
)
def grad_cam(query: Query) -> Map:
    """`sum_k mean_hw(d target / d A_k) A_k`, as grad_cam; for comparison of the two.

    Captum averages over the third axis and those after it, whatever they are, and reads a module's last output. Layers
    laid out otherwise than `[N, C, h, w]`, and other calls or inputs of a module, are refused; grad_cam reads them all.
    """
    layer = query.resolved_layer()
    layout, place = query.handle.layer(layer, query.shape).layout, Place.parse(layer)
    if layout is None or layout.order != "nchw":
        order = layout.order if layout else "unknown"
        raise NotApplicable(f"captum takes layer {layer!r} for [N, C, h, w], but its layout is {order}; use grad_cam")
    if place.call is not None or place.entering:
        raise NotApplicable(f"captum reads the last output of a module only, not {layer!r}; use grad_cam")
    module = query.handle.module.get_submodule(place.module)

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        given = asked(part) | {"inputs": part.inputs}  # without a gradient, so that the graph begins at the layer
        try:
            found = attr().LayerGradCam(Scored(part, kept), module).attribute(**given, relu_attributions=False)
        except RuntimeError as error:
            if "does not require grad" not in str(error) and "not have been used" not in str(error):
                raise
            raise NotApplicable(f"the target does not depend on layer {layer!r}; name another with layer=") from error
        if not isinstance(found, Tensor):
            raise NotApplicable(f"layer {layer!r} gives several tensors, which captum keeps apart; use grad_cam")
        return tensor_of(found)[:, 0], torch.cat(kept)

    values, scores = joined(query.each(answer))
    return Map(values, layer=layer, scores=scores)
