"""Streaming statistics of a layer: `look` at a batch's map, `update` with what was seen, `merge`, `compute`.

Each holds as much as it did after the first batches, however long the data set; states of shards merge into the state
of the whole. `look` runs inside the forward pass and keeps nothing of the map; `update` is called when the pass has
come to its end, so that a pass that fails half-way counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.errors import BadInput

__all__ = ["Extremes", "Features", "Histogram", "Moments", "Quantiles", "Sampled", "Sketch", "Statistic", "Top"]


class Statistic(Protocol):
    """What the scan feeds. State is a dict of tensors and numbers."""

    def look(self, maps: Tensor) -> Any:
        """What of a batch's map `[N, C, h, w]` it needs."""

    def update(self, looked: Any, indices: Tensor) -> None:
        """Takes in a batch: what `look` gave, and the indices `[N]` of its images."""

    def merge(self, other: Self) -> None:
        """Takes in what another has seen of other images."""

    def compute(self) -> Any:
        """The answer so far."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _State:
    """State kept in the attributes a class names in `_kept`."""

    _kept: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._kept:
            setattr(self, name, state[name])


@dataclass(frozen=True)
class Extremes:
    """The k best for each of C channels: `scores`, `indices` of images, flat `positions` in the map, each `[C, k]`.

    Places that nothing fills hold index -1.
    """

    scores: Tensor
    indices: Tensor
    positions: Tensor

    @property
    def found(self) -> Tensor:
        """`[C, k]` bool: the places that hold an image."""
        return self.indices >= 0


class Top(_State):
    """The k images, with the position in each, where every channel is largest, or smallest.

    Equal values rank by image and position, as in a stable sort of all of them; images come in rising order.
    per_image: how many positions of one image may count.
    """

    _kept = ("scores", "indices", "positions")

    def __init__(self, k: int, *, largest: bool = True, per_image: int = 1) -> None:
        if k < 1 or per_image < 1:
            raise BadInput(f"k and per_image are at least 1; got {k} and {per_image}")
        self.k, self.largest, self.per_image = k, largest, per_image
        self.scores = torch.empty(0, 0)
        self.indices = torch.empty(0, 0, dtype=torch.long)
        self.positions = torch.empty(0, 0, dtype=torch.long)

    def look(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and positions of each image's best, `[N, C, m]`; position -1 where the score does not suffice."""
        flat = maps.flatten(2) if self.largest else -maps.flatten(2)
        if self.per_image > 1:
            values, order = flat.sort(dim=2, descending=True, stable=True)
            return values[:, :, : self.per_image], order[:, :, : self.per_image]
        values = flat.amax(2)
        positions = torch.full_like(values, -1, dtype=torch.long)
        bar = self.scores[:, -1].to(values) if self.scores.numel() else values.new_tensor(-torch.inf)
        rows, channels = (values > bar).nonzero(
            as_tuple=True
        )  # an argmax of everything costs several times the maximum
        positions[rows, channels] = flat[rows, channels].argmax(1)
        return values[:, :, None], positions[:, :, None]

    def update(self, looked: tuple[Tensor, Tensor], indices: Tensor) -> None:
        values, positions = (one.transpose(0, 1).flatten(1) for one in looked)  # [C, N * m]
        images = indices.to(values.device).repeat_interleave(looked[0].shape[2]).expand_as(positions)
        values = values.where(positions >= 0, -torch.inf)
        self._take(values, images.where(positions >= 0, -1), positions)

    def merge(self, other: Self) -> None:
        if other.scores.numel():
            self._take(other.scores, other.indices, other.positions, later=False)

    def compute(self) -> Extremes:
        scores = self.scores if self.largest else -self.scores
        return Extremes(scores.cpu(), self.indices.cpu(), self.positions.cpu())

    def _take(self, scores: Tensor, indices: Tensor, positions: Tensor, *, later: bool = True) -> None:
        """Keeps the best of what is held and what comes; later: the images that come follow those held."""
        if not self.scores.numel():
            self.scores = scores.new_full((len(scores), self.k), -torch.inf)
            self.indices = torch.full_like(self.scores, -1, dtype=torch.long)
            self.positions = self.indices
        scores, indices, positions = (
            torch.cat([held.to(new.device), new], 1)
            for held, new in ((self.scores, scores), (self.indices, indices), (self.positions, positions))
        )
        if not later:
            order = indices.argsort(dim=1, stable=True)  # positions of an image come in order already
            scores, indices, positions = (one.gather(1, order) for one in (scores, indices, positions))
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self.scores, self.indices, self.positions = (one.gather(1, order) for one in (scores, indices, positions))


class Sampled(_State):
    """Each channel's score, its largest value, and the position of it, for `size` images drawn without repetition.

    Which images is decided by their index and the seed alone, so that shards draw what the whole would.
    """

    _kept = ("ranks", "indices", "scores", "positions")

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if size < 1:
            raise BadInput(f"a sample holds at least 1 image; got {size}")
        self.size, self.seed = size, seed
        self.ranks = self.indices = torch.empty(0, dtype=torch.long)
        self.scores = torch.empty(0, 0)
        self.positions = torch.empty(0, 0, dtype=torch.long)

    def look(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        scores, positions = maps.flatten(2).max(2)
        return scores, positions

    def update(self, looked: tuple[Tensor, Tensor], indices: Tensor) -> None:
        self._take(_ranks(indices, self.seed), indices, *(one.cpu() for one in looked))

    def merge(self, other: Self) -> None:
        if len(other.indices):
            self._take(other.ranks, other.indices, other.scores, other.positions)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """`indices [R]` in order, `scores [R, C]`, flat `positions [R, C]`."""
        order = self.indices.argsort()
        return self.indices[order], self.scores[order], self.positions[order]

    def _take(self, ranks: Tensor, indices: Tensor, scores: Tensor, positions: Tensor) -> None:
        if not len(self.indices):
            self.scores, self.positions = scores[:0], positions[:0]
        ranks = torch.cat([self.ranks, ranks])
        chosen = ranks.argsort(stable=True)[: self.size]
        self.ranks, self.indices = ranks[chosen], torch.cat([self.indices, indices])[chosen]
        self.scores = torch.cat([self.scores, scores])[chosen]
        self.positions = torch.cat([self.positions, positions])[chosen]


class Moments(_State):
    """Mean and, if asked, covariance of the channels over all images and positions, in float64 (Chan et al. 1979)."""

    _kept = ("count", "mean", "scatter")

    def __init__(self, *, covariance: bool = False) -> None:
        self.covariance = covariance
        self.count = 0
        self.mean = self.scatter = torch.empty(0, dtype=torch.float64)

    def look(self, maps: Tensor) -> tuple[int, Tensor, Tensor]:
        flat = maps.transpose(0, 1).flatten(1).double()  # [C, M]
        mean = flat.mean(1)
        flat = flat - mean[:, None]
        return flat.shape[1], mean, flat @ flat.T if self.covariance else flat.square().sum(1)

    def update(self, looked: tuple[int, Tensor, Tensor], indices: Tensor) -> None:
        self._take(looked[0], looked[1].cpu(), looked[2].cpu())

    def merge(self, other: Self) -> None:
        if other.count:
            self._take(other.count, other.mean, other.scatter)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean `[C]`, and the covariance `[C, C]` or variance `[C]` (divided by the count)."""
        return self.mean, self.scatter / max(self.count, 1)

    def _take(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total, apart = self.count + count, mean - self.mean
        between = torch.outer(apart, apart) if self.covariance else apart.square()
        self.scatter = self.scatter + scatter + between * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


class Histogram(_State):
    """How often each channel's values fall into equal bins. The range doubles when a value lies outside."""

    _kept = ("counts", "reach")

    def __init__(self, bins: int = 1024) -> None:
        if bins < 4 or bins % 4:
            raise BadInput(f"a histogram has a multiple of 4 bins; got {bins}")
        self.bins = bins
        self.reach = 0.0  # the range is [-reach, reach)
        self.counts = torch.empty(0, 0, dtype=torch.long)

    def look(self, maps: Tensor) -> tuple[Tensor, float]:
        flat = maps.transpose(0, 1).flatten(1)  # [C, M]
        largest = float(flat.abs().max())
        reach = max(self.reach, 2.0 ** math.floor(math.log2(largest) + 1) if largest > 0 else 2.0**-20)
        places = ((flat.double() / reach + 1) * (self.bins / 2)).long().clamp(0, self.bins - 1)
        rows = torch.arange(len(flat), device=flat.device)[:, None] * self.bins
        counts = torch.bincount((places + rows).flatten(), minlength=len(flat) * self.bins)
        return counts.view(len(flat), self.bins), reach

    def update(self, looked: tuple[Tensor, float], indices: Tensor) -> None:
        self._take(looked[0].cpu(), looked[1])

    def merge(self, other: Self) -> None:
        if other.reach:
            self._take(other.counts, other.reach)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The counts `[C, bins]` and the edges `[bins + 1]`."""
        return self.counts, torch.linspace(-self.reach, self.reach, self.bins + 1, dtype=torch.float64)

    def _take(self, counts: Tensor, reach: float) -> None:
        if not self.reach:
            self.counts, self.reach = counts, reach
            return
        most = max(self.reach, reach)
        self.counts = self._widened(self.counts, self.reach, most) + self._widened(counts, reach, most)
        self.reach = most

    def _widened(self, counts: Tensor, reach: float, most: float) -> Tensor:
        while reach < most:
            pairs = counts.view(len(counts), -1, 2).sum(2)
            counts = torch.nn.functional.pad(pairs, (self.bins // 4, self.bins // 4))
            reach *= 2
        return counts


class Quantiles(_State):
    """Quantiles of each channel over all images and positions, from a sketch (Karnin, Lang and Liberty 2016).

    Exact until `size` values were seen; then a quantile's rank is off by about 1/size of their number.
    """

    _kept = ("levels", "flips")

    def __init__(self, size: int = 2048) -> None:
        if size < 8 or size % 2:
            raise BadInput(f"a quantile sketch holds an even number of at least 8 values; got {size}")
        self.size = size
        self.levels: list[Tensor] = []  # a value at level l stands for 2 ** l
        self.flips: list[int] = []

    def look(self, maps: Tensor) -> list[tuple[int, Tensor]]:
        """The values `[C, M]`, thinned to `size` where there are more, with their level."""
        flat = maps.transpose(0, 1).flatten(1)
        level = max(0, math.ceil(math.log2(flat.shape[1] / self.size)))
        step = 2**level
        whole = flat.shape[1] // step * step
        thinned = flat[:, :whole].sort(1).values[:, step // 2 :: step]
        return [(level, thinned.cpu().clone()), (0, flat[:, whole:].cpu().clone())]

    def update(self, looked: list[tuple[int, Tensor]], indices: Tensor) -> None:
        for level, values in looked:
            self._take(level, values)

    def merge(self, other: Self) -> None:
        for level, values in enumerate(other.levels):
            self._take(level, values)

    def compute(self) -> Sketch:
        return Sketch(tuple(self.levels))

    def _take(self, level: int, values: Tensor) -> None:
        while len(self.levels) <= level:
            self.levels.append(values[:, :0])
            self.flips.append(0)
        held = torch.cat([self.levels[level], values], 1)
        if held.shape[1] <= self.size:
            self.levels[level] = held
            return
        even = held.shape[1] // 2 * 2
        self.levels[level] = held[:, even:]
        self.flips[level] ^= 1  # now the lower, now the upper of each pair, so that errors cancel
        self._take(level + 1, held[:, :even].sort(1).values[:, 1 - self.flips[level] :: 2])


@dataclass(frozen=True)
class Sketch:
    """Values of C channels by level; one at level l stands for 2 ** l of the values seen."""

    levels: tuple[Tensor, ...]

    def quantile(self, q: float) -> Tensor:
        """`[C]`: the smallest value with at least a share `q` of all values at or below it."""
        if not 0 <= q <= 1:
            raise BadInput(f"a quantile is a share from 0 to 1; got {q}")
        if not self.levels:
            raise BadInput("no values were seen, so they have no quantile")
        weights = torch.cat([torch.full((one.shape[1],), 2**level) for level, one in enumerate(self.levels)])
        values, order = torch.cat(self.levels, 1).sort(1)
        below = weights[order].cumsum(1)
        wanted = max(1, math.ceil(q * int(below[0, -1])))
        return values.gather(1, (below < wanted).sum(1, keepdim=True))[:, 0]


class Features(_State):
    """Every image's map averaged over positions, `[images, C]`. It grows with the data set."""

    _kept = ("indices", "vectors")

    def __init__(self) -> None:
        self.indices: list[Tensor] = []
        self.vectors: list[Tensor] = []

    def look(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3)).float().cpu()

    def update(self, looked: Tensor, indices: Tensor) -> None:
        self.indices.append(indices)
        self.vectors.append(looked)

    def merge(self, other: Self) -> None:
        self.indices += other.indices
        self.vectors += other.vectors

    def compute(self) -> tuple[Tensor, Tensor]:
        """`indices [M]` in order and `vectors [M, C]`."""
        if not self.vectors:
            return torch.empty(0, dtype=torch.long), torch.empty(0, 0)
        indices = torch.cat(self.indices)
        order = indices.argsort()
        return indices[order], torch.cat(self.vectors)[order]


def _ranks(indices: Tensor, seed: int) -> Tensor:
    """A number for each index that looks random: splitmix64 (Steele et al. 2014)."""
    mixed = indices.cpu().numpy().astype(np.uint64) + np.uint64(
        (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))
