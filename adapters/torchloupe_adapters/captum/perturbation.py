"""What becomes of the target when a part of the image is covered."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_adapters.captum.asked import (
    asked,
    attr,
    each_from,
    joined,
    segments_of,
    target_of,
    tensor_of,
)
from torchloupe_core.baselines import filling
from torchloupe_core.errors import BadInput
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["feature_ablation", "occlusion"]


@method(
    "explain",
    "captum.occlusion",
    cost="1 forward for each window position (about 200)",
    paper="Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, section 4.2",
)
def occlusion(
    query: Query, *, window: int | None = None, stride: int | None = None, baseline: Tensor | float | str | None = None
) -> Map:
    """How much the target falls when a square of the image is covered, averaged over the squares a pixel lies in.

    window, stride: in pixels; 3/16 and 1/16 of the shorter side unless given. baseline: as in integrated gradients.
    """
    shorter = min(query.size)
    window = max(1, round(shorter * 3 / 16)) if window is None else window
    stride = max(1, min(window, round(shorter / 16))) if stride is None else stride
    if not 1 <= window <= shorter or not 1 <= stride <= window:
        raise BadInput(f"occlusion needs 1 <= stride <= window <= {shorter}; got window {window}, stride {stride}")
    channels = query.shape[0]

    def answer(part: Query, begin: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        fallen = (
            attr()
            .Occlusion(target_of(part, kept))
            .attribute(
                **asked(part),
                sliding_window_shapes=(channels, window, window),
                strides=(channels, stride, stride),
                baselines=begin,
                perturbations_per_eval=max(1, part.batch // len(part.inputs)),
            )
        )
        return tensor_of(fallen)[:, 0], kept[0]  # a window covers all channels, so they share one value

    values, scores = joined(each_from(query, baseline, answer))
    return Map(values, scores=scores)


@method(
    "explain",
    "captum.feature_ablation",
    needs=("segments",),
    cost="1 forward for each segment (about 50)",
    paper="Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, with superpixels for squares",
)
def feature_ablation(
    query: Query,
    *,
    segments: Tensor | None = None,
    n_segments: int = 50,
    baseline: Tensor | float | str | None = None,
) -> Map:
    """How much the target falls when a superpixel is covered; each pixel has its superpixel's value.

    segments, n_segments: as in lime. baseline: as in integrated gradients.
    """
    regions = segments_of(query, segments, n_segments)
    begin = filling(query, baseline).expand(len(query.inputs), *query.shape)
    values, scores = [], []
    for index, region in enumerate(regions):
        part, kept = query.only(index, index + 1), list[Tensor]()
        fallen = (
            attr()
            .FeatureAblation(target_of(part, kept))
            .attribute(
                **asked(part),
                baselines=begin[index, None],
                feature_mask=region[None, None].to(part.inputs.device),
                perturbations_per_eval=part.batch,
            )
        )
        values.append(tensor_of(fallen)[:, 0])
        scores.append(kept[0])
        query.progress(index + 1, len(regions))
    return Map(torch.cat(values), scores=torch.cat(scores))
