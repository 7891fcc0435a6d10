"""Which versions took part in an answer."""

from __future__ import annotations

import contextlib
import importlib.metadata

__all__ = ["versions"]

DISTRIBUTIONS = {  # where a backend's package is called otherwise
    "grad_cam": "grad-cam",
    "lucent": "torch-lucent",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
}


def versions(*backends: str) -> dict[str, str]:
    """Of this package, of torch, and of the backends that did the work."""
    found = {}
    for name in ["torchloupe", "torch", *(DISTRIBUTIONS.get(one, one) for one in backends if one != "native")]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a backend need not be a distribution
            found[name] = importlib.metadata.version(name)
    return found
