"""shap: Owen values of regions, halved again and again. Its first use in a process compiles for some seconds."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchloupe_adapters.captum.asked import one_by_one
from torchloupe_core.baselines import Baseline, filling
from torchloupe_core.borrow import kept_threads
from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.methods.masked import values_under
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["partition"]

AT_ONCE = 10  # masks between two looks at which region is next; shap's own number


@method(
    "explain",
    "shap.partition",
    cost="max_evals (500) forwards",
    paper="Lundberg and Lee 2017, A Unified Approach to Interpreting Model Predictions; Owen values of halved regions",
)
def partition(query: Query, *, max_evals: int = 500, baseline: Baseline = None) -> Map:
    """Each pixel's share of f(x) - f(baseline), by halving the image and then whichever region matters most.

    A region that is not halved further shares its value evenly among its pixels. The shares add up;
    `diagnostics["completeness_gap"]` is what is missing. max_evals: how often the model is asked about masks.
    """
    if max_evals < 4:
        raise BadInput(f"max_evals is at least 4, for the image, the baseline and two halves; got {max_evals}")
    with warnings.catch_warnings(), kept_threads():
        library = _library()
        begin = iter(filling(query, baseline).expand(len(query.inputs), *query.shape))
        answers = one_by_one(query, lambda part: _shares(library, part, next(begin), max_evals))
    values, scores, bases = map(torch.stack, zip(*answers, strict=True))
    gaps = scores - bases - values.sum((1, 2))
    return Map(values, scores=scores, diagnostics={"completeness_gap": gaps.tolist()})


def _shares(library: Any, part: Query, hidden: Tensor, max_evals: int) -> tuple[Tensor, Tensor, Tensor]:
    """The values `[H, W]` of one image, its score, the baseline's.

    The library masks a picture of ones, so that a pixel is hidden with all its channels.
    """
    shape = (*part.size, 1)
    seen: dict[bool, Tensor] = {}

    def values(pictures: Any) -> Any:
        masks = torch.from_numpy(np.ascontiguousarray(pictures)).view(-1, *part.size)
        found = values_under(part, hidden, masks).double().cpu()
        for mask, value in zip(masks, found, strict=True):
            if mask.all() or not mask.any():
                seen[bool(mask.all())] = value
        return found[:, None].numpy()

    way = library.explainers.PartitionExplainer(values, library.maskers.Image(np.zeros(shape), shape))
    found = way(np.ones((1, *shape)), max_evals=max_evals, batch_size=AT_ONCE, silent=True)
    return torch.from_numpy(found.values.reshape(part.size)), seen[True], seen[False]


def _library() -> Any:
    try:
        import shap
    except ImportError as error:
        raise MissingDependency.of("shap", "peers") from error
    return shap
