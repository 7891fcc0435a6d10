"""RISE (Petsiuk 2018): random masks weighted by the score of what they leave, in memory flat in their number."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["RandomMasks", "rise"]


@method(
    "explain",
    "rise",
    cost="n_masks forwards (4000)",
    paper="Petsiuk et al. 2018, RISE: Randomized Input Sampling for Explanation of Black-box Models, eq. 6",
    random=True,
)
def rise(query: Query, *, n_masks: int = 4000, cells: int = 7, p: float = 0.5, baseline: Tensor | float = 0.0) -> Map:
    """`S = 1/(n p) sum_i f(x * M_i) M_i`, at the input's resolution.

    baseline: what masked-out pixels become, a number or `[C, H, W]`, in units of the model's input; zero is the mean
    colour of a normalised input. The same masks serve every image.
    """
    if n_masks < 1 or cells < 1 or not 0 < p < 1:
        raise BadInput(f"rise needs n_masks and cells of at least 1 and 0 < p < 1; got {n_masks}, {cells}, {p}")
    inputs = query.inputs
    masks = RandomMasks(n_masks, cells, p, query.size, query.generator(), like=inputs)
    filling = torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device)
    try:
        filling = filling.expand(query.shape)
    except RuntimeError:
        raise BadInput(f"baseline is a number or [C, H, W] = {list(query.shape)}; got {list(filling.shape)}") from None
    exact = torch.promote_types(inputs.dtype, torch.float32)  # thousands of terms are too many for half precision
    total = torch.zeros(len(inputs), *query.size, dtype=exact, device=inputs.device)
    start = done = 0
    while start < n_masks:
        chosen = masks[start : start + query.batch]  # [m, H, W]
        start += len(chosen)
        for image, x in enumerate(inputs):
            scores = query.score(filling + (x - filling) * chosen[:, None], [image] * len(chosen))
            total[image].view(-1).addmv_(chosen.flatten(1).T.to(exact), scores.to(exact))
            done += len(chosen)
            query.progress(done, n_masks * len(inputs))
    return Map(total / (n_masks * p))


class RandomMasks:
    """n random masks `[n, H, W]`, made when sliced: a coarse Bernoulli(p) grid, enlarged bilinearly, shifted at random.

    Bilinear enlargement is separable, so a slice costs two small matrix products. Only the grids, `cells ** 2` bits a
    mask, are drawn in advance, so that a mask does not depend on how the slices are cut.
    """

    def __init__(
        self, n: int, cells: int, p: float, size: tuple[int, int], generator: torch.Generator, *, like: Tensor
    ) -> None:
        self.size = size
        cell = [math.ceil(length / cells) for length in size]
        self._grids = torch.rand(n, cells, cells, generator=generator) < p
        self._shifts = [torch.randint(one, (n,), generator=generator) for one in cell]
        self._enlarge = [_enlargement(cells, (cells + 1) * one).to(like) for one in cell]  # [(cells + 1) * cell, cells]

    def __len__(self) -> int:
        return len(self._grids)

    def __getitem__(self, chosen: slice) -> Tensor:
        rows, columns = (
            matrix[shift[chosen, None].to(matrix.device) + torch.arange(length, device=matrix.device)]
            for matrix, shift, length in zip(self._enlarge, self._shifts, self.size, strict=True)
        )  # [m, H, cells], [m, W, cells]
        return rows @ self._grids[chosen].to(rows) @ columns.transpose(1, 2)


def _enlargement(cells: int, length: int) -> Tensor:
    """The matrix `[length, cells]` of linear interpolation from `cells` to `length` samples."""
    unit = torch.eye(cells)[None]  # [1, cells, cells]: one channel for each cell
    return F.interpolate(unit, size=length, mode="linear", align_corners=False)[0].T
