"""scikit-learn: principal components, t-SNE, trustworthiness, k-means, and two small data sets it carries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchloupe_core.embedding import Projection, require_images
from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.registry import method

__all__ = ["clusters", "digits", "pca", "sample_photos", "trustworthiness", "tsne"]

PERPLEXITY = 30.0


@method("embed", "sklearn.pca", cost="1 singular value decomposition", paper="Hotelling 1933, principal components")
def pca(vectors: Tensor, dims: int, seed: int, *, whiten: bool = False) -> Projection:
    """The directions of most variance, largest first; explained_variance: their shares of the whole."""
    most = min(len(vectors) - 1, vectors.shape[1])
    if dims > most:
        raise BadInput(
            f"{len(vectors)} images of {vectors.shape[1]} features vary in at most {most} directions; got {dims}"
        )
    with _needed():
        from sklearn.decomposition import PCA
    # In float64: sums of squares of features far from zero leave little of their variance in float32.
    fitted = PCA(dims, whiten=whiten, random_state=seed)
    points = fitted.fit_transform(vectors.double().numpy())
    return Projection(
        torch.from_numpy(points).float(), {"explained_variance": fitted.explained_variance_ratio_.tolist()}
    )


@method(
    "embed",
    "sklearn.tsne",
    cost="neighbour search + layout",
    paper="van der Maaten and Hinton 2008, t-SNE",
    random=True,
)
def tsne(
    vectors: Tensor,
    dims: int,
    seed: int,
    *,
    perplexity: float | None = None,
    metric: str = "euclidean",
    learning_rate: float | None = None,
    iterations: int = 1000,
) -> Projection:
    """perplexity: 30, or a third of the other images where that is less. learning_rate: N / 48, at least 50."""
    count = len(vectors)
    require_images("tsne", count, max(4, dims + 1), dims)
    if perplexity is not None and not 1 <= perplexity < count:
        raise BadInput(f"perplexity is from 1 to below {count}, the number of images; got {perplexity}")
    if iterations < 250:
        raise BadInput(f"t-SNE takes at least 250 iterations; got {iterations}")
    with _needed():
        from sklearn.manifold import TSNE
    used = perplexity if perplexity is not None else min(PERPLEXITY, (count - 1) / 3)
    layout = TSNE(
        dims,
        perplexity=used,
        metric=metric,
        learning_rate="auto" if learning_rate is None else learning_rate,
        max_iter=iterations,
        init="pca",
        random_state=seed,
    )
    try:
        points = layout.fit_transform(vectors.numpy())
    except ValueError as error:  # options it does not take
        raise BadInput(f"scikit-learn: {error}") from error
    return Projection(torch.from_numpy(points), {"perplexity": used, "kl_divergence": float(layout.kl_divergence_)})


def trustworthiness(vectors: Tensor, points: Tensor, neighbors: int) -> float:
    """From 0 to 1: how far the nearest of each point are among the nearest of its vector (Venna and Kaski 2001)."""
    with _needed():
        from sklearn.manifold import trustworthiness as measured
    return float(measured(vectors.numpy(), points.numpy(), n_neighbors=neighbors))


def clusters(vectors: NDArray[np.float32], k: int, *, seed: int = 0) -> NDArray[np.int64]:
    """The cluster of each of `vectors [N, D]`, 0 to k - 1, by k-means, the largest cluster first."""
    with _needed():
        from sklearn.cluster import KMeans
    found = KMeans(k, n_init=4, random_state=seed % 2**32).fit(vectors).labels_
    order = np.argsort(-np.bincount(found, minlength=k), kind="stable")
    ranks = np.empty(k, dtype=np.int64)
    ranks[order] = np.arange(k)
    numbered: NDArray[np.int64] = ranks[found]
    return numbered


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Handwritten digits `[1797, 8, 8]` in 0..1 and their labels 0..9 `[1797]`."""
    with _needed():
        from sklearn.datasets import load_digits
    bundle = load_digits()
    return np.asarray(bundle.images / 16.0, dtype=np.float32), np.asarray(bundle.target, dtype=np.int64)


def sample_photos() -> list[NDArray[np.uint8]]:
    """Two photographs (a temple, a flower), each `[427, 640, 3]`."""
    with _needed():
        from sklearn.datasets import load_sample_images
    return [np.asarray(photo, dtype=np.uint8) for photo in load_sample_images().images]


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependency('scikit-learn is not installed; pip install "scikit-learn>=1.5"') from error
