"""RISE (Petsiuk 2018): random masks weighted by the score of what they leave, in memory flat in their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput
from torchloupe_core.methods.masked import Masked
from torchloupe_core.query import Map, Query, finite
from torchloupe_core.registry import method

if TYPE_CHECKING:
    from torchloupe_core.results import Attribution

__all__ = ["Mean", "RandomMasks", "rise"]

BLOCK, EVERY = 16, 128  # masks summed at once; between two looks at whether the map is stable


def _again(found: Attribution, scores: Tensor) -> Map:
    """The maps of other scores `[N, n]` of the same masks, which are drawn anew from the seed."""
    asked, generator = found.options, torch.Generator().manual_seed(found.seed)
    masks = RandomMasks(
        asked["n_masks"], asked["cells"], asked["p"], found.size, generator, like=scores, antithetic=asked["antithetic"]
    )
    means = []
    for one, used in zip(scores, found.diagnostics["n_masks"], strict=True):
        means.append(Mean(masks))
        means[-1].add(finite(one[:used]))
    return _joined(means)


@method(
    "explain",
    "rise",
    cost="n_masks forwards (4000)",
    paper="Petsiuk et al. 2018, RISE: Randomized Input Sampling for Explanation of Black-box Models, eq. 6",
    random=True,
    again=_again,
)
def rise(
    query: Query,
    *,
    n_masks: int = 4000,
    cells: int = 7,
    p: float = 0.5,
    tolerance: float | None = None,
    baseline: Tensor | float | str = 0.0,
    antithetic: bool = False,
    classes: bool = False,
) -> Map:
    """`S = 1/(n p) sum_i f(x * M_i) M_i`, at the input's resolution, and its standard error.

    The same masks serve every image. baseline: what masked-out pixels become, as in `baselines.filling`; zero is the
    mean colour of a normalised input. tolerance: stop an image once its `relative_error` is at most this, looked at
    after every 128 masks; n_masks is then the most. antithetic: each mask is followed by its complement, for about
    half the variance at equal forwards (measured .34 to .67 of it; of single images .2 to 1.6). classes: keep the
    model's output for every mask, n_masks x K float32 numbers an image, so that `of` of the result gives the map of any
    other class without a forward pass.

    Diagnostics, one number an image: `n_masks` used; `relative_error`, the standard error's mean over the map's
    standard deviation, both over positions.
    """
    _require_sense(n_masks, cells, p, tolerance, antithetic)
    exact = torch.empty(0, dtype=torch.promote_types(query.inputs.dtype, torch.float32), device=query.inputs.device)
    masks = RandomMasks(n_masks, cells, p, query.size, query.generator(), like=exact, antithetic=antithetic)
    masked, means = Masked(query, masks, baseline, classes=classes), []
    for index in range(len(query.inputs)):
        means.append(mean := Mean(masks))
        for scores in masked.scores(index):
            if mean.add(scores, tolerance):
                query.progress((index + 1) * n_masks, len(query.inputs) * n_masks)
                break
        if masked.outputs is not None:
            masked.outputs[index, 1 + mean.used :] = torch.nan  # of masks that did not count
    found = _joined(means)
    if masked.outputs is not None:
        found.scores = torch.cat(masked.own)
        found.outputs = masked.outputs[:, : 1 + max(mean.used for mean in means)]
    return found


class Mean:
    """The mean of `f M / p` over the first masks, and its standard error.

    Masks are taken in blocks of their own, so that nothing depends on how many went through the model at once.
    """

    def __init__(self, masks: RandomMasks) -> None:
        self.masks, self.used = masks, 0
        self._terms = 0  # independent ones: masks, or pairs of a mask and its complement
        self._origin = self._sum = self._squares = torch.zeros(())

    def add(self, scores: Tensor, tolerance: float | None = None) -> bool:
        """Takes in the whole blocks among the scores so far, `[m]`; True, at a block's end, once the map is stable."""
        while self.used < (stop := min(self.used + BLOCK, len(self.masks))) <= len(scores):
            self._add(scores[self.used : stop], self.masks[self.used : stop])
            self.used = stop
            if tolerance is not None and stop % EVERY == 0 and self.relative_error() <= tolerance:
                return True
        return False

    def _add(self, scores: Tensor, masks: Tensor) -> None:
        shares = masks.mul_(scores[:, None, None] / self.masks.p)  # [m, H, W]
        if self.masks.antithetic:
            shares = shares.view(-1, 2, *shares.shape[1:]).mean(1)
        if not self._terms:
            self._origin = shares.mean(0)  # squares are summed from near the mean, where they do not cancel
            self._sum, self._squares = torch.zeros_like(self._origin), torch.zeros_like(self._origin)
        shares -= self._origin
        self._sum += shares.sum(0)
        self._squares += shares.square_().sum(0)
        self._terms += len(shares)

    def values(self) -> Tensor:
        """The map, `[H, W]`."""
        return self._origin + self._sum / self._terms

    def standard_error(self) -> Tensor:
        """Of the map at each position, `[H, W]`; NaN if there was one mask only."""
        variance = (self._squares - self._sum.square() / self._terms).clamp(min=0) / (self._terms - 1)
        return (variance / self._terms).sqrt()

    def relative_error(self) -> float:
        """The standard error's mean over the map's standard deviation, both over positions; 0 for an exact map."""
        error, spread = self.standard_error().mean().item(), self.values().std(correction=0).item()
        return error / spread if spread else math.inf if error else 0.0


def _joined(means: Sequence[Mean]) -> Map:
    return Map(
        torch.stack([mean.values() for mean in means]),
        standard_error=torch.stack([mean.standard_error() for mean in means]),
        diagnostics={
            "n_masks": [mean.used for mean in means],
            "relative_error": [mean.relative_error() for mean in means],
        },
    )


def _require_sense(n_masks: int, cells: int, p: float, tolerance: float | None, antithetic: bool) -> None:
    if n_masks < 1 or cells < 1 or not 0 < p < 1:
        raise BadInput(f"rise needs n_masks and cells of at least 1 and 0 < p < 1; got {n_masks}, {cells}, {p}")
    if tolerance is not None and not tolerance > 0:
        raise BadInput(f"tolerance is a share of the map's standard deviation, above 0; got {tolerance}")
    if antithetic and (p != 0.5 or n_masks % 2):
        raise BadInput(f"antithetic masks come in pairs and need p=0.5 and an even n_masks; got p={p}, {n_masks}")


class RandomMasks:
    """n random masks `[n, H, W]`, made when sliced: a coarse Bernoulli(p) grid, enlarged bilinearly, shifted at random.

    antithetic: each odd mask is one minus the mask before it. Bilinear enlargement is separable, so a slice costs two
    small matrix products. Only the grids, `cells ** 2` bits a mask, are drawn in advance, so that a mask does not
    depend on how the slices are cut.
    """

    def __init__(
        self,
        n: int,
        cells: int,
        p: float,
        size: tuple[int, int],
        generator: torch.Generator,
        *,
        like: Tensor,
        antithetic: bool = False,
    ) -> None:
        self.p, self.size, self.antithetic = p, size, antithetic
        cell = [math.ceil(length / cells) for length in size]
        # One row of numbers a mask: the masks of a shorter run are the first of a longer one.
        drawn = torch.rand(n // 2 if antithetic else n, cells**2 + 2, generator=generator)
        self._grids = (drawn[:, 2:] < p).view(-1, cells, cells)
        self._shifts = [(drawn[:, axis] * one).long() for axis, one in enumerate(cell)]
        if antithetic:
            self._grids = torch.stack([self._grids, ~self._grids], 1).flatten(0, 1)
            self._shifts = [shift.repeat_interleave(2) for shift in self._shifts]
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
