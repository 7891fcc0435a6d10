"""openTSNE: t-SNE whose cost grows linearly with the number of images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.borrow import kept_threads
from torchloupe_core.embedding import Projection, require_images
from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.registry import method

__all__ = ["tsne"]

PERPLEXITY = 30.0


@method("embed", "opentsne.tsne", cost="neighbour search + layout", paper="Policar et al. 2024, openTSNE", random=True)
def tsne(
    vectors: Tensor,
    dims: int,
    seed: int,
    *,
    perplexity: float | None = None,
    metric: str = "euclidean",
    exaggeration: float | None = None,
    iterations: int = 500,
) -> Projection:
    """perplexity: 30, or a third of the other images where that is less. iterations: after 250 that exaggerate."""
    count = len(vectors)
    require_images("opentsne.tsne", count, max(4, dims + 1), dims)
    if perplexity is not None and not 1 <= perplexity <= (count - 1) / 3:
        raise BadInput(f"perplexity is from 1 to {(count - 1) / 3:.4g}, a third of the other images; got {perplexity}")
    try:
        from openTSNE import TSNE
    except ImportError as error:
        raise MissingDependency.of("openTSNE", "opentsne") from error
    used = perplexity if perplexity is not None else min(PERPLEXITY, (count - 1) / 3)
    layout = TSNE(
        n_components=dims,
        perplexity=used,
        metric=metric,
        exaggeration=exaggeration,
        n_iter=iterations,
        random_state=seed,
        n_jobs=1,
        negative_gradient_method="auto" if dims == 2 else "bh",  # the other one lays out at most two
    )
    try:
        with kept_threads():
            found = layout.fit(vectors.numpy())
    except ValueError as error:  # options it does not take
        raise BadInput(f"openTSNE: {error}") from error
    points = torch.from_numpy(np.array(found, dtype=np.float32))
    return Projection(points, {"perplexity": used, "kl_divergence": float(found.kl_divergence)})
