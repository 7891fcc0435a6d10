"""lime (marcotcr/lime): a linear model of the target, fitted to the image with superpixels left out.

The library is shown a picture of ones and sets them to zero where superpixels are left out; the images are put together
here, in the model's own precision and with the baseline of every other method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchloupe_adapters.captum.asked import one_by_one, segments_of
from torchloupe_core.baselines import Baseline, filling
from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.methods.masked import values_under
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["image"]

AT_ONCE = 256  # pictures of ones and zeros kept until the model is asked


@method(
    "explain",
    "lime.image",
    needs=("segments",),
    cost="n_samples (1000) forwards",
    paper="Ribeiro et al. 2016, Why Should I Trust You?",
    random=True,
)
def image(
    query: Query,
    *,
    n_samples: int = 1000,
    segments: Tensor | None = None,
    n_segments: int = 50,
    kernel_width: float = 0.25,
    baseline: Baseline = None,
) -> Map:
    """The weight of each superpixel in a linear model of the target, fitted to images with superpixels left out.

    As captum.lime, but a sample counts by the square root of the kernel. segments, n_segments: as there; kernel_width:
    of the kernel, on the cosine distance. `diagnostics["r2"]`: what the fit explains of the target's variation.
    """
    if n_samples < 2 or kernel_width <= 0:
        raise BadInput(f"n_samples is at least 2, kernel_width above 0; got {n_samples} and {kernel_width}")
    library = _library()
    begin = filling(query, baseline).expand(len(query.inputs), *query.shape)
    rest = iter(zip(segments_of(query, segments, n_segments), begin, strict=True))

    def answer(part: Query) -> tuple[Tensor, Tensor, float]:
        region, hidden = next(rest)
        numbers, kept = region.cpu().numpy(), list[Tensor]()

        def values(pictures: Any) -> Any:
            kept.append(values_under(part, hidden, torch.from_numpy(pictures[..., 0])).double().cpu())
            return kept[-1][:, None].numpy()

        way = library.LimeImageExplainer(kernel_width, random_state=np.random.RandomState(query.seed % 2**32))
        with _without_bars(library):
            found = way.explain_instance(
                np.ones((*query.size, 1), np.uint8),
                values,
                labels=(0,),
                top_labels=None,
                hide_color=0,
                num_samples=n_samples,
                batch_size=AT_ONCE,
                segmentation_fn=lambda picture: numbers,
            )
        weights = torch.zeros(int(region.max()) + 1, dtype=torch.float64)
        for segment, weight in found.local_exp[0]:
            weights[segment] = float(weight)
        return weights[region.cpu()], kept[0][0], float(found.score)

    maps, scores, r2 = zip(*one_by_one(query, answer), strict=True)
    return Map(torch.stack(maps), scores=torch.stack(scores), diagnostics={"r2": list(r2)})


def _library() -> Any:
    try:
        import lime.lime_image
    except ImportError as error:
        raise MissingDependency.of("lime", "peers") from error
    return lime.lime_image


@contextlib.contextmanager
def _without_bars(library: Any) -> Iterator[None]:
    """Inside, the library draws no progress bars of its own."""
    before = library.tqdm
    try:
        library.tqdm = iter
        yield
    finally:
        library.tqdm = before
