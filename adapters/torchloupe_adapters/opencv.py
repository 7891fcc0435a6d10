"""OpenCV: cutting an object out of a picture."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.registry import method

__all__ = ["grabcut"]


@method("segment", "opencv.grabcut", cost="no forward", paper="Rother et al. 2004, GrabCut")
def grabcut(images: Tensor, maps: Tensor, *, steps: int = 5) -> Tensor:
    """`[N, H, W]` bool from pictures `[N, 3, H, W]` in [0, 1] and attribution maps `[N, H, W]`.

    Seeds as in Simonyan 2013: above the 95th percentile of the map is object, below the 30th background, the rest open.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingDependency.of("opencv-python-headless", "segment") from error
    masks = []
    for image, values in zip(images, maps, strict=True):
        if not bool((values > values.min()).any()):
            raise BadInput("the map is the same everywhere, so it does not say where the object is")
        ranks = values.flatten().argsort().argsort().view(values.shape).double() / values.numel()
        seeds = np.full(values.shape, cv2.GC_PR_BGD, np.uint8)
        seeds[(ranks > 0.7).numpy()] = cv2.GC_PR_FGD
        seeds[(ranks > 0.95).numpy()] = cv2.GC_FGD
        seeds[(ranks < 0.3).numpy()] = cv2.GC_BGD
        picture = np.ascontiguousarray((image.permute(1, 2, 0).numpy()[:, :, ::-1] * 255).astype(np.uint8))
        cv2.setRNGSeed(0)
        cv2.grabCut(picture, seeds, None, np.zeros((1, 65)), np.zeros((1, 65)), steps, cv2.GC_INIT_WITH_MASK)
        masks.append(torch.from_numpy((seeds == cv2.GC_FGD) | (seeds == cv2.GC_PR_FGD)))
    return torch.stack(masks)
