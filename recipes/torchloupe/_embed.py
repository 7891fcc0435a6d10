"""The data set as the model sees it, laid out in two or three dimensions."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchloupe._features import gathered, handle_of
from torchloupe._models import ModelLike
from torchloupe._versions import versions
from torchloupe_adapters.sklearn import trustworthiness
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.embedding import Embedding, Projection
from torchloupe_core.errors import BadInput
from torchloupe_core.features import FeatureSet
from torchloupe_core.registry import Method

__all__ = ["embed"]

PCA = "sklearn.pca"
CHECKED, NEIGHBORS = 2000, 10  # images and neighbours that trustworthiness is measured with


def embed(
    model: ModelLike | None,
    dataset: Any,
    *,
    layer: object = None,
    method: str = "umap",
    dims: int = 2,
    seed: int = 0,
    pca: int | None = None,
    store: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    resume: bool = True,
    batch_size: int | None = None,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> Embedding:
    """Every image as a point, near the images that the model sees alike, by one of `tl.methods("embed")`.

    dataset: of any kind, or its `tl.features` or a store of them, which need no model (None). layer, store, engine,
    resume: as in `features`. method: "umap"
    compiles for some seconds at its first use in a process. dims: 2 or 3. pca: so many principal components are laid
    out instead of the features. Off unless given: with 50 of 12,288 features "umap" took a quarter of the time at
    slightly higher trustworthiness, with 50 of 2,048 neither changed; `.diagnostics` says which share of the variance
    they hold. options: of the method; where there are few images,
    neighbours and perplexity are as many as there can be, as `.diagnostics` says. Equal images stay separate points.
    Raises `BadInput` for fewer images than a method can lay out, and where all images have the same features.
    """
    way = registry.find("embed", method)
    way.check_options(options)
    if dims not in (2, 3):
        raise BadInput(f"an embedding has 2 or 3 dimensions; got dims={dims}")
    _require_pca(way, pca, dims)
    begun, handle = time.perf_counter(), handle_of(model, device, dtype)
    forwards = 0 if handle is None else handle.forwards
    facts: dict[str, Any] = {"store": store, "engine": engine, "resume": resume}
    facts |= {"batch_size": batch_size, "workers": workers, "autocast": autocast, "skip_failures": skip_failures}
    found = gathered(handle, dataset, layer, progress=progress, **facts)
    _require_different(found)
    with progress_bar(f"{way.name}: {way.cost}", " steps", progress, delay=0):
        placed = _placed(way, found, dims, seed, pca, options)
    return Embedding(
        method=way.name,
        backend=way.backend,
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=0 if handle is None else handle.forwards - forwards,
        versions=versions(way.backend),
        options={**way.options, **options, "pca": pca},
        points=placed.points,
        labels=found.labels,
        indices=found.indices,
        names=found.names,
        classes=found.classes,
        layer=found.layer,
        diagnostics={**placed.diagnostics, **_trust(found.vectors, placed.points, seed)},
        skipped=found.failures,
        data=found.data,
    )


def _require_pca(way: Method, pca: int | None, dims: int) -> None:
    if pca is None:
        return
    if way.name == PCA:
        raise BadInput("method pca gives principal components as it is; leave out pca=")
    if pca <= dims:
        raise BadInput(f"pca is more components than the {dims} dimensions wanted; got {pca}")


def _require_different(found: FeatureSet) -> None:
    if bool((found.vectors == found.vectors[0]).all()):
        if len(found) == 1:
            raise BadInput("the data set holds a single image, so there is nothing to lay out")
        raise BadInput(
            f"all {len(found)} images have the same features at {found.layer!r}; there is nothing to lay out"
        )


def _placed(
    way: Method, found: FeatureSet, dims: int, seed: int, pca: int | None, options: Mapping[str, Any]
) -> Projection:
    vectors, kept = found.vectors, {}
    if pca is not None:
        reduced: Projection = registry.find("embed", PCA).run(vectors, pca, seed)
        vectors, kept = reduced.points, {"pca_variance": sum(reduced.diagnostics["explained_variance"])}
    placed: Projection = way.run(vectors, dims, seed, **options)
    points = placed.points.detach().float().cpu()
    if points.shape != (len(found), dims) or not bool(points.isfinite().all()):
        raise BadInput(f"{way.name} gave no finite point for each of the {len(found)} images")
    return Projection(points, {**kept, **placed.diagnostics})


def _trust(vectors: Tensor, points: Tensor, seed: int) -> dict[str, Any]:
    """How far the layout can be trusted, of a sample where there are many images; nothing for a handful."""
    count = min(len(vectors), CHECKED)
    neighbors = min(NEIGHBORS, (count - 1) // 2)
    if neighbors < 1:
        return {}
    rows = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:count]
    value = trustworthiness(vectors[rows], points[rows], neighbors)
    return {"trustworthiness": value, "trustworthiness_neighbors": neighbors, "trustworthiness_images": count}
