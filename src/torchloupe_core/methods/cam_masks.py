"""Class activation maps without gradients: channels weighed by what becomes of the target with or without them."""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import NotApplicable
from torchloupe_core.layout import Layout, to_map
from torchloupe_core.pace import out_of_memory
from torchloupe_core.query import Map, Query, finite
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
        for _, stop, values in query.pace.run(features.shape[1], partial(_masked, part, features[0])):
            scores.append(values)
            query.progress(done + stop, features.shape[1] * len(query.inputs))
        done += features.shape[1]
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
    scale = _scale(query, layout)
    maps, scores, done = [], [], 0
    for index in range(len(query.inputs)):
        without = partial(_without, query.only(index, index + 1), layer, layout)
        fallen = []
        for _, stop, (found, values) in query.pace.run(layout.channels, without, scale=scale):
            features, value = found, values[:1]  # [1, C, h, w], [1]: the same each time
            fallen.append(value - values[1:])
            query.progress(done + stop, layout.channels * len(query.inputs))
        done += layout.channels
        weights = torch.cat(fallen) / value.abs().where(value != 0, 1.0)
        maps.append(torch.einsum("nchw,c->nhw", features, weights))
        scores.append(value)
    return Map(torch.cat(maps), layer=layer, scores=torch.cat(scores))


def _masked(part: Query, features: Tensor, first: int, last: int) -> Tensor:
    """The target's value for one image masked by each of some channels of `features [C, h, w]`."""
    masks = F.interpolate(features[None, first:last], part.size, mode="bilinear", align_corners=False)[0]
    low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
    varied = high - low > FLAT * high.abs().maximum(low.abs())  # else there is but rounding to stretch
    masks = ((masks - low) / (high - low).where(varied, 1.0)).where(varied, 0.0)
    return part.score(part.inputs * masks[:, None], [0] * len(masks))


def _scale(query: Query, layout: Layout) -> int:
    """How many channels take an image's place: more where few positions are left for the head to hold.

    At a sixteenth of the image's positions, the first stage of a residual network, the head is nearly the whole model.
    """
    shrunk = query.size[0] * query.size[1] // (16 * layout.grid[0] * layout.grid[1])
    return max(1, min(MOST_VARIANTS // query.batch, shrunk))


def _features(query: Query, layer: str) -> Tensor:
    with query.handle.watch(layer, shape=query.shape) as watch:
        watch(query.inputs)
        return watch.map(layer)


def _without(query: Query, layer: str, layout: Layout, first: int, last: int) -> tuple[Tensor, Tensor]:
    """One image's map `[1, C, h, w]`; its target's value as it is, then with each of some channels zero, `[1 + c]`."""
    channels = torch.arange(first, last, device=query.inputs.device)
    variants = 1 + len(channels)
    seen: list[Tensor] = []

    def ablated(activation: Tensor) -> Tensor:
        seen[:] = [to_map(activation[:1], layout)]
        changed = activation.expand(variants, *activation.shape[1:]).clone()
        rows = 1 + channels - first
        if layout.order == "tokens":  # whose map may be a copy, put in order
            changed[rows, layout.prefix :, channels] = 0
        else:
            to_map(changed, layout)[rows, channels] = 0
        return changed

    targets = list(query.targets) * variants
    try:  # the trunk sees one image, the head every variant
        values = query.handle.read(query.inputs, targets, exchange={layer: ablated})
        if len(values) == variants:
            return seen[0], finite(values)
    except RuntimeError as error:
        if out_of_memory(error) or not re.search("size|shape", str(error)):
            raise  # the model's own trouble; else what follows joins both and every variant needs its own trunk
    inputs = query.inputs.expand(variants, *query.inputs.shape[1:])
    return seen[0], finite(query.handle.read(inputs, targets, exchange={layer: ablated}))
