"""The images of a data set most like others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from torchloupe._features import gathered, handle_of
from torchloupe._models import ModelLike
from torchloupe._versions import versions
from torchloupe_adapters.pynndescent import descend
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.dataset import DataSet, open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.features import FeatureSet
from torchloupe_core.handle import Handle
from torchloupe_core.nearest import Metric
from torchloupe_core.neighbors import Neighbors, Space
from torchloupe_core.queries import Query
from torchloupe_core.search import Approximate, Hits, in_features, in_pixels, of_pixels

__all__ = ["neighbors"]

Found = tuple[FeatureSet, Hits, DataSet | None]  # the queries, what was found, where it is read


def neighbors(
    model: ModelLike | None,
    query: Any,
    dataset: Any,
    *,
    layer: object = None,
    k: int = 5,
    space: Space = "features",
    metric: Metric = "cosine",
    exclude_self: bool | None = None,
    approximate: bool = False,
    seed: int = 0,
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
) -> Neighbors:
    """The k images of a data set nearest to each query, in the features of a layer or in pixels.

    query: images of any kind, `tl.features` of them, or numbers of images of the data set, as `3` or `range(10)`.
    dataset: of any kind, or its `tl.features` or a store of them. layer, store, engine, resume: as in `features`; the
    store is of the data set. k: all there are, where there are fewer. space: "pixels" compares what the model is shown,
    in [0, 1], and reads the images once without keeping them. metric: "cosine" for 1 - cos, or "l2". exclude_self:
    leaves out the query where it is in the data set itself, by number or by file; queries by number are left out unless
    told otherwise. The search is exact; approximate: by a graph of neighbours, sooner for many queries of a large data
    set, and it measures which share of the true ones it found.
    """
    _check(space, metric, k, layer, approximate)
    if space == "pixels" and (store is not None or engine is not None):
        raise BadInput("a search in pixels keeps nothing and is done here; leave out store= and engine=")
    begun, handle = time.perf_counter(), handle_of(model, device, dtype)
    forwards = 0 if handle is None else handle.forwards
    asked = Query.of(query, exclude_self)
    facts = {"batch_size": batch_size, "workers": workers, "autocast": autocast, "skip_failures": skip_failures}
    if space == "pixels":
        queries, hits, data = _by_pixels(handle, asked, dataset, k, metric, skip_failures, progress)
    else:
        gather = partial(gathered, handle, progress=progress, **facts)  # type: Callable[..., FeatureSet]
        way = partial(descend, seed=seed) if approximate else None
        kept: dict[str, Any] = {"store": store, "engine": engine, "resume": resume}
        queries, hits, data = _by_features(gather, asked, gather(dataset, layer, **kept), k, metric, way)
    if not hits.indices.shape[1]:
        raise BadInput("the data set holds no other image than the query")
    return Neighbors(
        method="pynndescent" if approximate else "exact",
        backend="pynndescent" if approximate else "native",
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=0 if handle is None else handle.forwards - forwards,
        versions=versions("pynndescent" if approximate else "native"),
        options={"k": k, "exclude_self": exclude_self},
        indices=hits.indices,
        distances=hits.distances,
        labels=hits.labels,
        query_indices=queries.indices,
        query_labels=queries.labels,
        space=space,
        metric=metric,
        layer=None if space == "pixels" else queries.layer,
        excluded=asked.excludes,
        names=hits.names,
        query_names=queries.names,
        classes=hits.classes,
        diagnostics={"images": hits.images, **hits.diagnostics},
        skipped=hits.skipped,
        data=data,
        query_data=queries.data,
    )


def _check(space: str, metric: str, k: int, layer: object, approximate: bool) -> None:
    if space not in ("features", "pixels"):
        raise BadInput(f'space is "features" or "pixels"; got {space!r}')
    if metric not in ("cosine", "l2"):
        raise BadInput(f'metric is "cosine" or "l2"; got {metric!r}')
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise BadInput(f"k is a whole number of at least 1; got {k!r}")
    if space == "pixels" and layer is not None:
        raise BadInput(f"a search in pixels reads no layer; leave out layer={str(layer)!r}")
    if space == "pixels" and approximate:
        raise BadInput("a search in pixels is exact; leave out approximate=")


def _by_features(
    gather: Callable[..., FeatureSet],
    asked: Query,
    data: FeatureSet,
    k: int,
    metric: Metric,
    approximate: Approximate | None,
) -> Found:
    own: list[int] = []
    if asked.numbers is not None:
        own = asked.rows(data.indices.tolist(), data.skipped)
        queries = data.some(own)
    else:
        queries = gather(asked.images, data.layer)
    leave_out = asked.left_out(queries, data.names, own)
    return queries, in_features(queries, data, k, metric, leave_out, approximate), data.data


def _by_pixels(
    handle: Handle | None, asked: Query, dataset: Any, k: int, metric: Metric, skip: bool, progress: bool | None
) -> Found:
    data, chosen = _readable(handle, dataset)
    if asked.numbers is not None:
        there = chosen if chosen is not None else data.order
        if there is not None:
            asked.rows(there, {})
        queries = of_pixels(data, asked.numbers, skip)
        queries = queries.some(asked.rows(queries.indices.tolist(), queries.skipped))
    else:
        queries = of_pixels(_readable(handle, asked.images)[0], None, skip)
    leave_out = asked.left_out(queries, data.names, asked.numbers or ())
    with progress_bar("pixels", " images", progress) as report:
        return queries, in_pixels(queries, data, chosen, k, metric, leave_out, skip, report), data


def _readable(handle: Handle | None, dataset: Any) -> tuple[DataSet, list[int] | None]:
    """Where pixels are read, and of which images; None for all of them."""
    if isinstance(dataset, FeatureSet):
        if dataset.data is None:
            raise BadInput("these features do not say where their images are read; give the data set itself")
        return dataset.data, dataset.indices.tolist()
    if handle is None:
        raise BadInput("without a model nothing says how images are prepared; give the model")
    return open_data(dataset, handle.spec), None
