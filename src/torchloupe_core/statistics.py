"""Streaming statistics of a layer: `look` at a batch's map, `update` with what was seen, `merge`, `compute`.

Each holds as much as it did after the first batches, however long the data set; states of shards merge into the state
of the whole. `look` runs inside the forward pass and keeps nothing of the map; `update` is called when the pass has
come to its end, so that a pass that fails half-way counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.errors import BadInput

__all__ = ["Extremes", "Features", "Histogram", "Moments", "Quantiles", "Sampled", "Sketch", "Statistic", "Top"]

CHUNK = 2**18  # values worked on at once: as many as a processor's cache holds
FEW = 16  # so many maxima are found one after another sooner than by sorting
SMALLEST = 2.0**-21  # a histogram resolves no range below this


class Statistic(Protocol):
    """What the scan feeds. State is a dict of tensors and numbers."""

    def look(self, maps: Tensor, indices: Tensor) -> Any:
        """What it needs of a batch's map `[N, C, h, w]`; the images' indices are `[N]`."""

    def update(self, looked: Any, indices: Tensor) -> None:
        """Takes in a batch: what `look` gave, and the indices `[N]` of its images."""

    def merge(self, other: Self) -> None:
        """Takes in what another has seen of other images."""

    def fresh(self) -> Self:
        """One made alike that has seen nothing."""

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with."""

    def compute(self) -> Any:
        """The answer so far."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _State:
    """State kept in the attributes a class names in `_kept`; only one made alike, by `_options`, may take it in."""

    _options: tuple[str, ...] = ()
    _kept: tuple[str, ...] = ()

    def fresh(self) -> Self:
        """One made alike that has seen nothing."""
        return type(self)(**self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with."""
        return {name: getattr(self, name) for name in self._options}

    def state_dict(self) -> dict[str, Any]:
        """A copy of what it holds: tensors, numbers, and the options it was made with. Lists are numbered from 0."""
        state = self.options
        for name in self._kept:
            value = getattr(self, name)
            if isinstance(value, list):
                state |= {f"{name}.{place}": one.clone() for place, one in enumerate(value)}
            else:
                state[name] = value.clone() if isinstance(value, Tensor) else value
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, in tensors or numpy arrays. Raises `BadInput` if it is of another kind of statistic."""
        single = [name for name in self._kept if not isinstance(getattr(self, name), list)]
        lacking = [name for name in (*self._options, *single) if name not in state]
        if lacking:
            raise BadInput(f"this is no state of {type(self).__name__}: it lacks {', '.join(lacking)}")
        self._require_alike(state)
        for name in self._kept:
            held = getattr(self, name)
            if isinstance(held, list):
                places = takewhile(lambda place, name=name: f"{name}.{place}" in state, count())  # type: ignore[misc]
                value: Any = [torch.as_tensor(state[f"{name}.{place}"]).clone() for place in places]
            elif isinstance(held, Tensor):
                value = torch.as_tensor(state[name]).clone()
            else:
                value = type(held)(state[name])
            setattr(self, name, value)

    def _require_alike(self, options: Mapping[str, Any]) -> None:
        for name in self._options:
            if options[name] != getattr(self, name):
                made = f"{type(self).__name__}({name}={getattr(self, name)!r})"
                raise BadInput(f"{made} cannot take in what one with {name}={options[name]!r} has seen")


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

    Equal values rank by image and position, as in a stable sort of all of them, if batches come in rising order of
    their images; states merge in any order. per_image: how many positions of one image may count.
    """

    _options: tuple[str, ...] = ("k", "largest", "per_image")
    _kept = ("scores", "indices", "positions")

    def __init__(self, k: int, *, largest: bool = True, per_image: int = 1) -> None:
        if k < 1 or per_image < 1:
            raise BadInput(f"k and per_image are at least 1; got {k} and {per_image}")
        self.k, self.largest, self.per_image = k, largest, per_image
        self.scores = torch.empty(0, 0)  # negated if the smallest are wanted
        self.indices = torch.empty(0, 0, dtype=torch.long)
        self.positions = torch.empty(0, 0, dtype=torch.long)

    def look(self, maps: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and positions of each image's best, `[N, C, m]`; position -1 where the score does not suffice."""
        flat = maps.flatten(2)
        best = flat.amax(2) if self.largest else -flat.amin(2)
        enough = best > self.scores[:, -1].to(best) if self.scores.numel() else torch.ones_like(best, dtype=torch.bool)
        shape = (*best.shape, min(self.per_image, flat.shape[2]))
        values, positions = best.new_full(shape, -torch.inf), best.new_full(shape, -1, dtype=torch.long)
        if bool(enough.any()):  # where in the map is asked of these alone: it costs several times the maximum
            chosen = flat[enough] if self.largest else -flat[enough]  # [R, h*w]
            values[enough], positions[enough] = _first(chosen, shape[2])
        return values, positions

    def update(self, looked: tuple[Tensor, Tensor], indices: Tensor) -> None:
        values, positions = (one.transpose(0, 1).flatten(1) for one in looked)  # [C, N * m]
        images = indices.to(values.device).repeat_interleave(looked[0].shape[2]).expand_as(positions)
        self._take(values, images, positions)

    def merge(self, other: Self) -> None:
        """Takes in what another has seen of other images; it may have kept more of them."""
        self._require_alike({**other.options, "k": min(self.k, other.k)})
        if other.scores.numel():
            self._take(other.scores, other.indices, other.positions)

    def compute(self) -> Extremes:
        scores = self.scores if self.largest else -self.scores
        return Extremes(scores.cpu(), self.indices.cpu(), self.positions.cpu())

    def _take(self, *new: Tensor) -> None:
        """Keeps the best of what is held and what comes: scores, indices and positions."""
        if not self.scores.numel():
            self.scores = new[0].new_full((len(new[0]), self.k), -torch.inf)
            self.indices = new[1].new_full(self.scores.shape, -1)
            self.positions = self.indices.clone()
        channels = (new[2] >= 0).any(1).nonzero()[:, 0]
        if not len(channels):
            return
        held = [self.scores, self.indices, self.positions]
        both = [torch.cat([old[channels], one[channels].to(old)], 1) for old, one in zip(held, new, strict=True)]
        order = both[1].argsort(dim=1, stable=True)  # positions of one image are in order already
        order = order.gather(1, both[0].gather(1, order).argsort(dim=1, descending=True, stable=True))[:, : self.k]
        for old, one in zip(held, both, strict=True):
            old[channels] = one.gather(1, order)


class Sampled(_State):
    """Each channel's score and the position of it for `size` images drawn without repetition.

    at: "max" for the largest value of an image's map, "random" for the value at a position drawn for each image. What
    is drawn is decided by the image's index and the seed alone, so that shards draw what the whole would.
    """

    _options = ("size", "seed", "at")
    _kept = ("ranks", "indices", "scores", "positions")

    def __init__(self, size: int, *, seed: int = 0, at: Literal["max", "random"] = "max") -> None:
        if size < 1:
            raise BadInput(f"a sample holds at least 1 image; got {size}")
        self.size, self.seed, self.at = size, seed, at
        self.ranks = self.indices = torch.empty(0, dtype=torch.long)
        self.scores = torch.empty(0, 0)
        self.positions = torch.empty(0, 0, dtype=torch.long)

    def look(self, maps: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self.at == "max":
            scores, positions = _first(maps.flatten(2), 1)
        else:
            drawn = _ranks(indices, self.seed + 1) % maps[0, 0].numel()
            positions = drawn.to(maps.device)[:, None, None].expand(*maps.shape[:2], 1)
            scores = maps.flatten(2).gather(2, positions)
        return scores[:, :, 0], positions[:, :, 0]

    def update(self, looked: tuple[Tensor, Tensor], indices: Tensor) -> None:
        self._take(_ranks(indices, self.seed), indices, *looked)

    def merge(self, other: Self) -> None:
        self._require_alike(vars(other))
        if len(other.indices):
            self._take(other.ranks, other.indices, other.scores, other.positions)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """`indices [R]` in order, `scores [R, C]`, flat `positions [R, C]`."""
        order = self.indices.argsort()
        return self.indices[order], self.scores[order], self.positions[order]

    def _take(self, ranks: Tensor, indices: Tensor, scores: Tensor, positions: Tensor) -> None:
        if not len(self.indices):
            self.scores, self.positions = scores[:0].cpu(), positions[:0].cpu()
        elif len(self.indices) == self.size and bool((ranks > self.ranks[-1]).all()):
            return
        ranks = torch.cat([self.ranks, ranks])
        chosen = ranks.argsort(stable=True)[: self.size]
        self.ranks, self.indices = ranks[chosen], torch.cat([self.indices, indices])[chosen]
        self.scores = torch.cat([self.scores, scores.cpu()])[chosen]
        self.positions = torch.cat([self.positions, positions.cpu()])[chosen]


class Moments(_State):
    """Mean and, if asked, covariance of the channels over all images and positions (Chan et al. 1979).

    Sums are kept in float64; products within a few thousand positions are made in the map's own precision, centred.
    """

    _options = ("covariance",)
    _kept = ("count", "mean", "scatter")

    def __init__(self, *, covariance: bool = False) -> None:
        self.covariance = covariance
        self.count = 0
        self.mean = self.scatter = torch.empty(0, dtype=torch.float64)

    def look(self, maps: Tensor, indices: Tensor) -> Self:
        """The moments of this batch."""
        found = type(self)(covariance=self.covariance)
        for part in torch.split(maps, max(1, CHUNK // maps[0].numel())):
            flat = _wide(part.transpose(0, 1).flatten(1))  # [C, M]
            mean, scatter = found._within(flat)
            if not bool(scatter.isfinite().all()):  # squares that float32 cannot hold
                mean, scatter = found._within(flat.double())
            found._take(flat.shape[1], mean.double().cpu(), scatter.double().cpu())
        return found

    def update(self, looked: Self, indices: Tensor) -> None:
        self.merge(looked)

    def merge(self, other: Self) -> None:
        self._require_alike(vars(other))
        if other.count:
            self._take(other.count, other.mean, other.scatter)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean `[C]`, and the covariance `[C, C]` or variance `[C]` (divided by the count), in float64."""
        return self.mean, self.scatter / max(self.count, 1)

    def _within(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        mean = flat.mean(1)
        flat = flat - mean[:, None]
        return mean, flat @ flat.T if self.covariance else flat.square().sum(1)

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

    _options = ("bins",)
    _kept = ("counts", "reach")

    def __init__(self, bins: int = 1024) -> None:
        if bins < 4 or bins % 4:
            raise BadInput(f"a histogram has a multiple of 4 bins; got {bins}")
        self.bins = bins
        self.reach = 0.0  # the range is [-reach, reach), a power of two
        self.counts = torch.empty(0, 0, dtype=torch.long)

    def look(self, maps: Tensor, indices: Tensor) -> tuple[Tensor, float]:
        """The counts `[C, bins]` of this batch and their reach."""
        largest = max(abs(float(bound)) for bound in maps.aminmax())
        reach = max(self.reach, 2.0 ** math.frexp(max(largest, SMALLEST))[1])
        parts = torch.split(maps.transpose(0, 1), max(1, CHUNK // max(maps[:, 0].numel(), self.bins)))
        return torch.cat([self._counted(_wide(part.flatten(1)), reach) for part in parts]), reach

    def update(self, looked: tuple[Tensor, float], indices: Tensor) -> None:
        self._take(looked[0].cpu(), looked[1])

    def merge(self, other: Self) -> None:
        self._require_alike(vars(other))
        if other.reach:
            self._take(other.counts, other.reach)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The counts `[C, bins]` and the edges `[bins + 1]`."""
        half = self.bins // 2
        return self.counts, torch.arange(-half, half + 1, dtype=torch.float64) / half * self.reach

    def _counted(self, flat: Tensor, reach: float) -> Tensor:
        half = self.bins // 2
        flat = (
            flat.double() if half & (half - 1) else flat
        )  # a product that is exact: times a power of two, or in float64
        places = (flat * (half / reach)).floor_().to(torch.int32)
        places += torch.arange(half, len(flat) * self.bins, self.bins, dtype=torch.int32, device=flat.device)[:, None]
        return torch.bincount(places.flatten(), minlength=len(flat) * self.bins).view(len(flat), self.bins)

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

    _options = ("size",)
    _kept = ("levels", "halved")

    def __init__(self, size: int = 2048) -> None:
        if size < 8 or size % 2:
            raise BadInput(f"a quantile sketch holds an even number of at least 8 values; got {size}")
        self.size = size
        self.levels: list[Tensor] = []  # a value at level l stands for 2 ** l
        self.halved = torch.zeros(64, dtype=torch.long)  # how often each level was

    def look(self, maps: Tensor, indices: Tensor) -> list[tuple[int, Tensor]]:
        """The values `[C, M]`, thinned to `size` where there are more, with their level."""
        flat = _wide(maps.transpose(0, 1).flatten(1))
        level = max(0, math.ceil(math.log2(flat.shape[1] / self.size)))
        if not level:
            return [(0, flat.to("cpu", copy=True))]
        step = 2**level
        whole = flat.shape[1] // step * step
        thinned = _sorted(flat[:, :whole])[:, step // 2 :: step]
        return [(level, thinned.to("cpu", copy=True)), (0, flat[:, whole:].to("cpu", copy=True))]

    def update(self, looked: list[tuple[int, Tensor]], indices: Tensor) -> None:
        for level, values in looked:
            self._take(level, values)

    def merge(self, other: Self) -> None:
        self._require_alike(vars(other))
        for level, values in enumerate(other.levels):
            self._take(level, values)

    def compute(self) -> Sketch:
        return Sketch(tuple(self.levels))

    def _take(self, level: int, values: Tensor) -> None:
        while len(self.levels) <= level:
            self.levels.append(values[:, :0])
        held = torch.cat([self.levels[level], values], 1)
        if held.shape[1] <= self.size:
            self.levels[level] = held
            return
        even = held.shape[1] // 2 * 2
        self.levels[level] = held[:, even:]
        self._take(level + 1, _sorted(held[:, :even])[:, self._coin(level) :: 2])

    def _coin(self, level: int) -> int:
        """Whether the lower or the upper of each pair stays: by chance, then the other, so that errors cancel."""
        turn = int(self.halved[level])
        self.halved[level] += 1
        return (int(_ranks(torch.tensor([turn // 2]), seed=level)) + turn) % 2


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

    def look(self, maps: Tensor, indices: Tensor) -> Tensor:
        return _wide(maps).mean((2, 3)).cpu()

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


def _first(values: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m largest of the last dimension and where they are; the first of equal ones come first."""
    if m > FEW:
        order = values.argsort(dim=-1, descending=True, stable=True)[..., :m]
        return values.gather(-1, order), order
    found, rest = [], values.clone() if m > 1 else values
    for _ in range(m):
        found.append(_argmax(rest))
        if m > 1:
            rest.scatter_(-1, found[-1], -torch.inf)
    order = torch.cat(found, -1)
    return values.gather(-1, order), order


def _argmax(values: Tensor) -> Tensor:
    """The first place of the largest, `[..., 1]`; on a CPU by numpy, which is several times faster."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(values.detach().numpy().argmax(-1, keepdims=True))
    return values.argmax(-1, keepdim=True)


def _sorted(values: Tensor) -> Tensor:
    """Each row in order; on a CPU by numpy, which is many times faster, as it carries no indices along."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.detach().numpy(), axis=1))
    return values.sort(1).values


def _wide(values: Tensor) -> Tensor:
    """Half-precision values in float32, others as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _ranks(indices: Tensor, seed: int) -> Tensor:
    """A number for each index that looks random: splitmix64 (Steele et al. 2014)."""
    mixed = indices.cpu().numpy().astype(np.uint64) + np.uint64(
        (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))
