"""Sobol indices (Fel 2021): how much of the target's variance under random masks each part of the image is part of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.methods.masked import Masked
from torchloupe_core.query import Map, Query, finite
from torchloupe_core.registry import method

if TYPE_CHECKING:
    from torchloupe_core.results import Attribution

__all__ = ["Designs", "first_order", "sobol", "total_order", "variance"]

FLAT = 4  # of the score's rounding: a standard deviation below that is no variation


def _again(found: Attribution, scores: Tensor) -> Map:
    """The maps of other scores `[N, n]` of the same masks."""
    return _indices(finite(scores), found.options["cells"])


@method(
    "explain",
    "sobol",
    cost="n_designs (32) x (cells^2 (64) + 2) forwards",
    paper="Fel et al. 2021, Look at the Variance!",
    random=True,
    signed=False,
    again=_again,
)
def sobol(
    query: Query,
    *,
    cells: int = 8,
    n_designs: int = 32,
    baseline: Tensor | float | str = 0.0,
    classes: bool = False,
) -> Map:
    """The total Sobol index of each cell of a grid, `[N, cells, cells]`: its share of the target's variance, by itself
    and together with others, while every cell fades by a random amount of its own between the image and a baseline.

    Shares overlap where cells work together, so they sum to 1 or more. A target that does not vary gives zeros. The
    amounts are a scrambled Sobol sequence, balanced for `n_designs` a power of two. baseline, classes: as in rise.

    Diagnostics, one entry an image: `variance` of the target; `first_order`, each cell's share by itself.
    """
    if n_designs < 2 or n_designs & (n_designs - 1):
        raise BadInput(f"sobol needs n_designs a power of two, as 16 or 32; got {n_designs}")
    most = min(*query.size, 102)  # of which a Sobol sequence has dimensions enough
    if not 1 <= cells <= most:
        raise BadInput(f"sobol needs cells from 1 to {most} for this image; got {cells}")
    designs = Designs(cells, n_designs, query.size, query.seed, like=query.inputs)
    masked, scores = Masked(query, designs, baseline, classes=classes), []
    for index in range(len(query.inputs)):
        *_, known = masked.scores(index)
        scores.append(known)
    found = _indices(torch.stack(scores), cells)
    if classes:
        found.scores, found.outputs = torch.cat(masked.own), masked.outputs
    return found


class Designs:
    """The masks of a Sobol analysis, made when sliced: samples A, B `[n, d]`, then for each cell A with B's column.

    A mask holds one number in [0, 1] for each of d = cells^2 cells, the same for all pixels of the cell.
    """

    def __init__(self, cells: int, n: int, size: tuple[int, int], seed: int, *, like: Tensor) -> None:
        self.cells, self.n = cells, n
        engine = torch.quasirandom.SobolEngine(2 * cells**2, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
        self.a, self.b = engine.draw(n).to(like).chunk(2, 1)  # [n, d] each
        self._rows, self._columns = (torch.arange(length, device=like.device) * cells // length for length in size)

    def __len__(self) -> int:
        return self.n * (self.cells**2 + 2)

    def __getitem__(self, chosen: slice) -> Tensor:
        points = self.points(chosen)
        return points.view(len(points), self.cells, self.cells)[:, self._rows[:, None], self._columns]

    def points(self, chosen: slice) -> Tensor:
        """Some masks as points `[m, d]`."""
        number = torch.arange(len(self), device=self.a.device)[chosen]
        block, row = number // self.n, number % self.n
        columns = torch.arange(self.a.shape[1], device=self.a.device)
        from_b = (block == 1)[:, None] | (block[:, None] - 2 == columns)
        return torch.where(from_b, self.b[row], self.a[row])


def total_order(scores: Tensor, d: int) -> Tensor:
    """Total Sobol indices `[N, d]` of scores `[N, n (d + 2)]` in the order of `Designs` (Jansen 1999)."""
    a, _, mixed = _samples(scores, d)
    return _shares((a[:, None] - mixed).square().mean(2) / 2, scores, d)


def first_order(scores: Tensor, d: int) -> Tensor:
    """First-order Sobol indices `[N, d]`, as `total_order` (Saltelli et al. 2010); an estimate may be negative."""
    a, b, mixed = _samples(scores, d)
    centre = torch.cat([a, b], 1).mean(1)[:, None]
    return _shares(((b - centre)[:, None] * (mixed - a[:, None])).mean(2), scores, d)


def variance(scores: Tensor, d: int) -> Tensor:
    """Of the scores of A and B, `[N]`; zero if it is but rounding."""
    a, b, _ = _samples(scores, d)
    both = torch.cat([a, b], 1)
    found, rounding = both.var(1, correction=0), FLAT * torch.finfo(both.dtype).eps * both.abs().amax(1)
    return found.where(found > rounding.square(), 0.0)


def _samples(scores: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of A and B, `[N, n]`, and of the mixed ones, `[N, d, n]`."""
    blocks = scores.view(len(scores), d + 2, -1)
    return blocks[:, 0], blocks[:, 1], blocks[:, 2:]


def _shares(effects: Tensor, scores: Tensor, d: int) -> Tensor:
    whole = variance(scores, d)[:, None]
    return (effects / whole.where(whole > 0, 1.0)).where(whole > 0, 0.0)


def _indices(scores: Tensor, cells: int) -> Map:
    grid = (len(scores), cells, cells)
    return Map(
        total_order(scores, cells**2).view(grid),
        diagnostics={
            "variance": variance(scores, cells**2).tolist(),
            "first_order": first_order(scores, cells**2).view(grid).tolist(),
        },
    )
