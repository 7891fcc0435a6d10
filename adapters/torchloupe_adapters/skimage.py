"""scikit-image: superpixels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, MissingDependency

__all__ = ["slic"]


def slic(image: Tensor, n_segments: int = 50) -> Tensor:
    """Superpixels (Achanta 2012) of a picture `[3, H, W]` in [0, 1]: `[H, W]` integers from 0.

    In a noisy picture colours say so little that nearly all superpixels merge; shape then counts for more.
    """
    try:
        from skimage.segmentation import slic as cut
    except ImportError as error:
        raise MissingDependency.of("scikit-image", None) from error
    if n_segments < 2:
        raise BadInput(f"superpixels need n_segments of at least 2; got {n_segments}")
    picture = image.permute(1, 2, 0).numpy()
    for compactness in (10, 100, 1000):
        labels = torch.from_numpy(cut(picture, n_segments=n_segments, compactness=compactness, start_label=0)).long()
        if int(labels.max()) + 1 >= n_segments / 2:
            break
    return labels
