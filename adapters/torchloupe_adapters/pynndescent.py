"""PyNNDescent: nearest neighbours by descending a graph of neighbours, which finds most of them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.borrow import kept_threads
from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.nearest import Metric

__all__ = ["LEAST", "descend"]

LEAST = 100  # vectors; among fewer there is nothing to gain
DEGREE = 30  # neighbours of each vector in the graph
METRICS = {"cosine": "cosine", "l2": "euclidean"}


def descend(queries: Tensor, vectors: Tensor, k: int, metric: Metric, seed: int) -> Tensor:
    """Rows of `vectors`, `[Q, k]`, that are likely the nearest of each query (Dong et al. 2011).

    Its first use in a process compiles for some seconds.
    """
    if len(vectors) < LEAST:
        raise BadInput(
            f"an approximate search is for at least {LEAST} images; these are {len(vectors)}, leave out approximate="
        )
    try:
        from pynndescent import NNDescent
    except ImportError as error:
        raise MissingDependency.of("pynndescent", "umap") from error
    degree = min(max(DEGREE, k + 1), len(vectors) - 1)
    with kept_threads():
        graph = NNDescent(vectors.numpy(), METRICS[metric], n_neighbors=degree, random_state=seed, n_jobs=1)
        rows, _ = graph.query(queries.numpy(), k=k)
    return torch.from_numpy(rows).long()
