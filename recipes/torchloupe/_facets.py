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
from torchloupe_core.dataset import DataSet
from torchloupe_core.embedding import Embedding
from torchloupe_core.errors import BadInput
from torchloupe_core.examples import Examples
from torchloupe_core.handle import Handle
from torchloupe_core.targets import Target, TargetLike, as_target, direction
from torchloupe_core.visualization import Visualization

__all__ = ["facets"]

DARKER = 0.5  # of the contrast of a mean image: what is begun with is faint, so that the unit decides
NEAREST = 15  # images to a cluster's centre that are averaged, of an embedding (Nguyen et al. 2016)


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

    Nguyen et al. 2016, Multifaceted Feature Visualization. images: a batch of those that answer most; or what
    `tl.examples` found, whose whole images are read again; or an `Embedding`, whose points are clustered, and the 15
    images nearest each centre read. Others are clustered by k-means of what `layer` gives for them, averaged over
    positions, the last spatial one unless given; or by `labels`, one for each image, of examples in the order of their
    indices. pull: weight of the direction from the mean of all to the cluster's own centre in that layer, added to the
    target (Wei et al. 2015, Understanding Intra-Class Knowledge Inside CNN). options: of `visualize`. `diagnostics`
    has the clusters of the images used as "labels", the largest first, and which images of a data set they are as
    "indices". Raises `BadInput` for a result that was saved, and for images of several sizes.
    """
    handle = opened(model)
    inputs, groups, indices = _read(handle, images, k, labels, seed)
    place = handle.features_at((inputs.shape[1], inputs.shape[2], inputs.shape[3])) if layer is None else str(layer)
    vectors = _vectors(handle, inputs, place)
    found = _labels(vectors, k, labels, seed) if groups is None else groups
    count = int(found.max()) + 1
    means = torch.stack([inputs[found == one].mean(0) for one in range(count)])
    centres = torch.stack([vectors[found == one].mean(0) for one in range(count)])
    wanted = [_pulled(as_target(target), place, centre - vectors.mean(0), pull) for centre in centres]
    faint = inputs.mean((0, 2, 3), keepdim=True) * (1 - DARKER) + means * DARKER
    made = rendered(handle, wanted, init=faint, steps=steps, seed=seed, **options)
    facts = {"labels": tuple(found.tolist()), **({} if indices is None else {"indices": tuple(indices.tolist())})}
    return replace(made, diagnostics={**made.diagnostics, **facts})


def _read(
    handle: Handle, images: Any, k: int, labels: Sequence[int] | Tensor | None, seed: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The images to begin with, their clusters if those are known, and which images of a data set they are."""
    if isinstance(images, Examples):
        indices = torch.tensor(sorted(set(images.indices[images.indices >= 0].tolist())))
        return _inputs(images.data, indices), None, indices
    if isinstance(images, Embedding):
        found = _labels(images.points, k, labels, seed)
        nearest = _nearest(images.points, found)
        indices = images.indices[nearest]
        return _inputs(images.data, indices), found[nearest], indices
    return handle.inputs(images), None, None


def _nearest(points: Tensor, labels: Tensor) -> Tensor:
    """Rows of the points nearest the centre of their cluster, in order."""
    rows = []
    for one in range(int(labels.max()) + 1):
        own = (labels == one).nonzero()[:, 0]
        distances = (points[own] - points[own].mean(0)).norm(dim=1)
        rows.append(own[distances.argsort(stable=True)[:NEAREST]])
    return torch.cat(rows).sort().values


def _inputs(data: DataSet | None, indices: Tensor) -> Tensor:
    if data is None:
        raise BadInput("a result that was saved no longer knows its data set, so there are no images to begin with")
    read = {sample.index: sample for sample in data.read_each(indices.tolist())}
    inputs = []
    for index in indices.tolist():
        if (one := read[index].inputs) is None:
            raise BadInput(f"{data.name(index)} was read before and cannot be now: {read[index].error}")
        inputs.append(one)
    if len({one.shape for one in inputs}) > 1:
        raise BadInput("the images are of several sizes, so they have no mean; give a model with an input size")
    return torch.stack(inputs)


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
