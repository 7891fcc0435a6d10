"""umap-learn: uniform manifold approximation and projection. Its first use in a process compiles for some seconds."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from torchloupe_core.borrow import kept_threads
from torchloupe_core.embedding import Projection, require_images
from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.registry import method

__all__ = ["umap"]

NEIGHBORS = 15


@method(
    "embed",
    "umap.umap",
    cost="neighbour search + layout; compiles first",
    paper="McInnes et al. 2018, UMAP",
    random=True,
)
def umap(
    vectors: Tensor,
    dims: int,
    seed: int,
    *,
    n_neighbors: int | None = None,
    min_dist: float = 0.1,
    metric: str = "euclidean",
    epochs: int | None = None,
) -> Projection:
    """n_neighbors: 15, or all others where there are fewer. By one thread, or the seed would not decide the result."""
    count = len(vectors)
    require_images("umap", count, dims + 2, dims)
    if n_neighbors is not None and not 2 <= n_neighbors < count:
        raise BadInput(f"n_neighbors is from 2 to {count - 1}, the other images; got {n_neighbors}")
    if not 0 <= min_dist <= 1:
        raise BadInput(f"min_dist is from 0 to 1; got {min_dist}")
    try:
        from umap import UMAP
    except ImportError as error:
        raise MissingDependency.of("umap-learn", "umap") from error
    used = n_neighbors if n_neighbors is not None else min(NEIGHBORS, count - 1)
    layout = UMAP(
        n_neighbors=used,
        n_components=dims,
        min_dist=min_dist,
        metric=metric,
        n_epochs=epochs,
        random_state=seed,
        n_jobs=1,
    )
    with warnings.catch_warnings(), kept_threads():
        warnings.simplefilter("ignore")  # of graphs in several parts and of its own defaults
        try:
            points = layout.fit_transform(vectors.numpy())
        except ValueError as error:  # options it does not take
            raise BadInput(f"umap: {error}") from error
    return Projection(torch.from_numpy(points), {"n_neighbors": used})
