"""The several things one unit answers to, each from a start of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchloupe._models import ModelLike, opened
from torchloupe._visualize import rendered
from torchloupe_adapters.sklearn import clusters
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.targets import Target, TargetLike, as_target, direction
from torchloupe_core.visualization import Visualization

__all__ = ["facets"]

DARKER = 0.5  # of the contrast of a mean image: what is begun with is faint, so that the unit decides


def facets(
    model: ModelLike,
    target: TargetLike,
    images: Any,
    *,
    k: int = 4,
    layer: object = None,
    labels: Sequence[int] | Tensor | None = None,
    pull: float = 0.0,
    steps: int = 256,
    seed: int = 0,
    **options: Any,
) -> Visualization:
    """An image of the target for each of k clusters of images that move it, begun with the cluster's mean image.

    Nguyen et al. 2016, Multifaceted Feature Visualization. images: those that answer most, as `tl.examples` finds them.
    They are clustered by k-means of what `layer` gives for them, averaged over positions, the last spatial one unless
    given; or by `labels`, one for each image. pull: weight of the direction from the mean of all to the cluster's own
    centre in that layer, added to the target (Wei et al. 2015, Understanding Intra-Class Knowledge Inside CNN).
    options: of `visualize`. The clusters are in `diagnostics["labels"]`, the largest first.
    """
    handle = opened(model)
    inputs = handle.inputs(images)
    place = handle.features_at((inputs.shape[1], inputs.shape[2], inputs.shape[3])) if layer is None else str(layer)
    vectors = _vectors(handle, inputs, place)
    found = _labels(vectors, k, labels, seed)
    count = int(found.max()) + 1
    means = torch.stack([inputs[found == one].mean(0) for one in range(count)])
    centres = torch.stack([vectors[found == one].mean(0) for one in range(count)])
    wanted = [_pulled(as_target(target), place, centre - vectors.mean(0), pull) for centre in centres]
    faint = inputs.mean((0, 2, 3), keepdim=True) * (1 - DARKER) + means * DARKER
    made = rendered(handle, wanted, init=faint, steps=steps, seed=seed, **options)
    return replace(made, diagnostics={**made.diagnostics, "labels": tuple(found.tolist())})


def _vectors(handle: Handle, inputs: Tensor, layer: str) -> Tensor:
    """`[N, C]`: a layer averaged over positions."""
    with handle.watch(layer, shape=(inputs.shape[1], inputs.shape[2], inputs.shape[3])) as watch:
        parts = []
        for part in torch.split(inputs, 8):
            watch(part)
            parts.append(watch.map(layer).mean((2, 3)).float().cpu())
    return torch.cat(parts)


def _labels(vectors: Tensor, k: int, labels: Sequence[int] | Tensor | None, seed: int) -> Tensor:
    if labels is None:
        if not 1 <= k <= len(vectors):
            raise BadInput(f"k is from 1 to the {len(vectors)} images; got {k}")
        return torch.from_numpy(clusters(vectors.numpy(), k, seed=seed))
    given = torch.as_tensor(labels)
    if given.shape != (len(vectors),):
        raise BadInput(f"{len(vectors)} images need as many labels; got {list(given.shape)}")
    numbered: Tensor = torch.unique(given, return_inverse=True)[1]
    return numbered


def _pulled(target: Target, layer: str, away: Tensor, pull: float) -> Target:
    if not pull:
        return target
    length = away.norm().clamp(min=1e-12)
    return target + pull * direction(layer, (away / length).tolist())
