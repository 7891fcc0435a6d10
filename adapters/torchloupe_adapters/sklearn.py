"""scikit-learn: the two small data sets that ship inside it, as plain arrays; k-means."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchloupe_core.errors import MissingDependency

__all__ = ["clusters", "digits", "sample_photos"]

MISSING = 'scikit-learn is not installed; pip install "scikit-learn>=1.4"'


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Handwritten digits `[1797, 8, 8]` in 0..1 and their labels 0..9 `[1797]`."""
    bundle = _datasets().load_digits()
    return np.asarray(bundle.images / 16.0, dtype=np.float32), np.asarray(bundle.target, dtype=np.int64)


def sample_photos() -> list[NDArray[np.uint8]]:
    """Two photographs (a temple, a flower), each `[427, 640, 3]`."""
    return [np.asarray(photo, dtype=np.uint8) for photo in _datasets().load_sample_images().images]


def clusters(vectors: NDArray[np.float32], k: int, *, seed: int = 0) -> NDArray[np.int64]:
    """The cluster of each of `vectors [N, D]`, 0 to k - 1, by k-means, the largest cluster first."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise MissingDependency(MISSING) from error
    found = KMeans(k, n_init=4, random_state=seed % 2**32).fit(vectors).labels_
    order = np.argsort(-np.bincount(found, minlength=k), kind="stable")
    ranks = np.empty(k, dtype=np.int64)
    ranks[order] = np.arange(k)
    numbered: NDArray[np.int64] = ranks[found]
    return numbered


def _datasets() -> Any:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise MissingDependency(MISSING) from error
    return sklearn.datasets
