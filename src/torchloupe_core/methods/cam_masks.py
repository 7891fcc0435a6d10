"""Class activation maps without gradients: channels weighed by what becomes of the target with or without them."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import NotApplicable
from torchloupe_core.layout import Layout, to_map
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["ablation_cam", "score_cam"]

FLAT = 1e-5  # of a map's largest value: a smaller range is rounding
MOST_VARIANTS = 512


@method(
    "explain",
    "score_cam",
    needs=("layer",),
    cost="1 forward for each channel",
    paper="Wang et al. 2020, Score-CAM, before the ReLU",
)
def score_cam(query: Query) -> Map:
    """`sum_k w_k A_k` where `w` is the softmax over channels of the target's value on the image masked by channel k.

    A channel's mask is its map, enlarged to the image and stretched to [0, 1]; masked-out pixels are zero.
    """
    layer = query.resolved_layer()
    maps, done = [], 0
    for index in range(len(query.inputs)):
        part = query.only(index, index + 1)
        features = _features(part, layer)
        scores = []
        for first in range(0, features.shape[1], query.batch):
            chosen = features[0, first : first + query.batch]  # [c, h, w]
            masks = F.interpolate(chosen[None], query.size, mode="bilinear", align_corners=False)[0]
            low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
            varied = high - low > FLAT * high.abs().maximum(low.abs())  # else there is but rounding to stretch
            masks = ((masks - low) / (high - low).where(varied, 1.0)).where(varied, 0.0)
            scores.append(part.score(part.inputs * masks[:, None], [0] * len(masks)))
            done += len(masks)
            query.progress(done, features.shape[1] * len(query.inputs))
        weights = torch.cat(scores).softmax(0)
        maps.append(torch.einsum("nchw,c->nhw", features, weights))
    return Map(torch.cat(maps), layer=layer)


@method(
    "explain",
    "ablation_cam",
    needs=("layer",),
    cost="1 forward + 1 of what follows the layer for each channel",
    paper="Desai and Ramaswamy 2020, Ablation-CAM, before the ReLU",
)
def ablation_cam(query: Query) -> Map:
    """`sum_k w_k A_k` with `w_k = (y - y_k) / |y|`, where `y_k` is the target's value with channel k set to zero.

    A chunk of channels shares one pass through what comes before the layer; only what follows runs for each of them.
    """
    layer = query.resolved_layer()
    layout = query.handle.layer(layer, query.shape).layout
    if layout is None:
        raise NotApplicable(f"layer {layer!r} gives no map of channels")
    chunk = _chunk(query, layout)
    maps, scores, done = [], [], 0
    for index in range(len(query.inputs)):
        part = query.only(index, index + 1)
        features, value, fallen = _features(part, layer), part.score(part.inputs), []
        for first in range(0, layout.channels, chunk):
            channels = torch.arange(first, min(first + chunk, layout.channels), device=features.device)
            fallen.append(value - _without(part, layer, layout, channels))
            done += len(channels)
            query.progress(done, layout.channels * len(query.inputs))
        weights = torch.cat(fallen) / value.abs().where(value != 0, 1.0)
        maps.append(torch.einsum("nchw,c->nhw", features, weights))
        scores.append(value)
    return Map(torch.cat(maps), layer=layer, scores=torch.cat(scores))


def _chunk(query: Query, layout: Layout) -> int:
    """How many channels share a pass through the trunk: more where few positions are left for the head to hold.

    At a sixteenth of the image's positions, the first stage of a residual network, the head is nearly the whole model.
    """
    shrunk = query.size[0] * query.size[1] // (16 * layout.grid[0] * layout.grid[1])
    return min(MOST_VARIANTS, query.batch * max(1, shrunk))


def _features(query: Query, layer: str) -> Tensor:
    with query.handle.watch(layer, shape=query.shape) as watch:
        watch(query.inputs)
        return watch.map(layer)


def _without(query: Query, layer: str, layout: Layout, channels: Tensor) -> Tensor:
    """The target's value for one image with each of some channels set to zero, `[c]`."""

    def ablated(activation: Tensor) -> Tensor:
        variants = activation.expand(len(channels), *activation.shape[1:]).clone()
        rows = torch.arange(len(channels), device=activation.device)
        if layout.order == "tokens":
            variants[rows, layout.prefix :, channels] = 0
        else:
            to_map(variants, layout)[rows, channels] = 0
        return variants

    targets = list(query.targets) * len(channels)
    try:  # the trunk sees one image, the head one variant for each channel
        values = query.handle.read(query.inputs, targets, exchange={layer: ablated})
        if len(values) == len(channels):
            return values
    except RuntimeError as error:
        if not re.search("size|shape", str(error)):
            raise  # the model's own trouble; else what follows joins both and every variant needs its own trunk
    inputs = query.inputs.expand(len(channels), *query.inputs.shape[1:])
    return query.handle.read(inputs, targets, exchange={layer: ablated})
