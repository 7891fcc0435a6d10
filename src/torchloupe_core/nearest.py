"""The nearest of many vectors, exactly: found in single precision, settled in double.

Products in single precision say which vectors can be among the nearest, within a bound on their rounding; the distances
of these few are then computed in double precision, so that the answer is that of a loop in double precision. Vectors
come block by block, and memory stays bounded whatever their number.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchloupe_core.errors import BadInput

__all__ = ["Metric", "Nearest", "apart", "norms"]

Metric = Literal["cosine", "l2"]

SCORES = 2**24  # held at once, 64 MB
QUERIES = 256  # looked for at once
REFINED = 2**22  # numbers of candidates held at once in double precision
LONG = 2**14  # beyond so many dimensions rounding in single precision says too little
MODERATE = (1e-15, 1e15)  # norms whose squares single precision holds

Floats = NDArray[np.floating]


def norms(vectors: Tensor) -> Tensor:
    """The length of each of the vectors `[M, D]`, in double precision, with little memory."""
    parts = torch.split(vectors, max(1, REFINED // vectors.shape[1]))
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])


class Nearest:
    """For each of Q queries the k nearest vectors so far, by rising distance; equal ones by their number.

    Distances are 1 - cos, from 0 to 2, or Euclidean. A vector of zeros has no direction: its cosine counts as 0.
    leave_out: for each query the number of a vector that does not count, -1 for none.
    """

    def __init__(self, queries: Tensor, k: int, metric: Metric = "cosine", leave_out: Tensor | None = None) -> None:
        if metric not in get_args(Metric):
            raise BadInput(f'metric is "cosine" or "l2"; got {metric!r}')
        if k < 1:
            raise BadInput(f"k is at least 1; got {k}")
        self.k, self.metric = k, metric
        self.queries, self.lengths = queries, norms(queries)
        self.left_out = torch.full((len(queries),), -1) if leave_out is None else leave_out
        self.distances = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
        self.numbers = torch.full((len(queries), k), -1)

    def update(self, vectors: Tensor, numbers: Tensor, lengths: Tensor | None = None) -> None:
        """Takes in vectors `[B, D]`, each under its number `[B]`; `lengths` are their `norms` where known already."""
        lengths = norms(vectors) if lengths is None else lengths
        size = max(1, SCORES // min(len(self.queries), QUERIES))
        for begin in range(0, len(self.queries), QUERIES):
            some = slice(begin, begin + QUERIES)
            for start in range(0, len(vectors), size):
                part = slice(start, start + size)
                self._take(some, vectors[part], numbers[part], lengths[part])

    def compute(self) -> tuple[Tensor, Tensor]:
        """Numbers and distances, `[Q, k]`; fewer columns where there are fewer vectors for some query."""
        count = int((self.numbers >= 0).sum(1).min())
        return self.numbers[:, :count], self.distances[:, :count]

    def _take(self, some: slice, vectors: Tensor, numbers: Tensor, lengths: Tensor) -> None:
        rows, columns = self._possible(some, vectors, numbers, lengths)
        distances = apart(self.queries[some], vectors, rows, columns, self.metric)
        held = (self.numbers[some] >= 0).nonzero()
        every = (
            torch.cat([held[:, 0], rows]).numpy(),
            torch.cat([self.distances[some][tuple(held.T)], distances]).numpy(),
            torch.cat([self.numbers[some][tuple(held.T)], numbers[columns]]).numpy(),
        )
        order = np.lexsort(every[::-1])  # by query, then distance, then number
        queries, found, names = (torch.from_numpy(one[order]) for one in every)
        place = torch.arange(len(queries)) - torch.searchsorted(queries, queries)  # within its own query
        kept = place < self.k
        self.distances[some][queries[kept], place[kept]] = found[kept]
        self.numbers[some][queries[kept], place[kept]] = names[kept]

    def _possible(self, some: slice, vectors: Tensor, numbers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Which query may have which vector among its nearest: all pairs that rounding does not exclude."""
        closeness, bound = self._closeness(some, vectors, lengths)
        unwanted = self.left_out[some, None] == numbers
        if bool(unwanted.any()):
            closeness = closeness.masked_fill(unwanted, -torch.inf)
        least = closeness.topk(min(self.k, len(vectors))).values[:, -1].double() - 2 * bound
        worst = self.distances[some, -1]  # infinite until k are held
        reached = 1 - worst if self.metric == "cosine" else self.lengths[some] ** 2 - worst**2
        least = torch.maximum(least, reached - bound)
        places = (closeness >= least.to(closeness)[:, None]).logical_and_(~unwanted).nonzero()
        return places[:, 0], places[:, 1]

    def _closeness(self, some: slice, vectors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What rises as distance falls, `[Q, B]`, and for each query how far it may be off.

        The cosine, or |q|^2 less the squared distance. A sum of D products is off by at most D u |q| |x| (Higham 2002,
        section 3.1), and a few roundings more; taken twice, for the rounding of the bound itself.
        """
        longest, wide = float(lengths.max()), self._wide(lengths)
        unit = 2.0**-53 if wide else 2.0**-24
        work = np.float64 if wide else np.float32
        # By numpy: torch's products may be made in bfloat16, where the caller has allowed it.
        found = torch.from_numpy(_array(self.queries[some], work) @ _array(vectors, work).T)
        rounding = 2 * (vectors.shape[1] + 8) * unit
        own = self.lengths[some]
        if self.metric == "cosine":
            inverse = (1 / lengths.where(lengths > 0, torch.inf)).to(found)
            found *= inverse
            found *= (1 / own.where(own > 0, torch.inf)).to(found)[:, None]
            return found, torch.full_like(own, rounding)
        found *= 2
        found -= (lengths**2).to(found)
        return found, rounding * (2 * own * longest + longest**2)

    def _wide(self, lengths: Tensor) -> bool:
        """Whether single precision would not do."""
        if self.queries.shape[1] > LONG:
            return True
        both = (lengths, self.lengths)
        least = min(float(one.where(one > 0, torch.inf).min()) for one in both)
        return least < MODERATE[0] or max(float(one.max()) for one in both) > MODERATE[1]


def apart(queries: Tensor, vectors: Tensor, rows: Tensor, columns: Tensor, metric: Metric) -> Tensor:
    """The distances of pairs of queries and vectors, from differences in double precision: 0 for the same. `[P]`."""
    size = max(1, REFINED // vectors.shape[1])
    pairs = zip(torch.split(rows, size), torch.split(columns, size), strict=True)
    parts = [_apart(queries[some].double(), vectors[others].double(), metric) for some, others in pairs]
    return torch.cat([*parts, torch.empty(0, dtype=torch.float64)])


def _apart(left: Tensor, right: Tensor, metric: Metric) -> Tensor:
    if metric == "l2":
        return (left - right).square().sum(1).sqrt()
    own, other = (one.square().sum(1, keepdim=True).sqrt() for one in (left, right))
    squared = (left / own.where(own > 0, 1) - right / other.where(other > 0, 1)).square().sum(1)
    return (squared / 2).where((own > 0).logical_and(other > 0)[:, 0], 1.0)  # |a - b|^2 = 2 - 2 cos for unit vectors


def _array(vectors: Tensor, work: type[np.floating]) -> Floats:
    return vectors.numpy().astype(work, copy=False)
