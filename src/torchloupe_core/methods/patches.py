"""The images and patches of a data set that move units most, least or middlingly, found in one pass.

What ranks: with crop="patch" the positions of a map, at most `per_image` of an image; with crop="image" the images, by
the largest value of their map. A target that reads several layers or the output has one value for an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.atoms import Unit
from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.features import first_shape
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.receptive import Fields, fields
from torchloupe_core.scan import Joint, Scanned, scan
from torchloupe_core.statistics import Extremes, Sampled, Statistic, Top
from torchloupe_core.targets import Bound, Target, as_target, channel

__all__ = ["BANDS", "Band", "Crop", "Found", "Places", "as_units", "placed", "search"]

Crop = Literal["patch", "image"]
Band = Literal["max", "min", "middle", "spectrum"]
Kind = Literal["channels", "spread", "fixed", "joint"]

BANDS = ("minimum", "slightly negative", "median", "slightly positive", "maximum")  # Olah et al. 2017
SAMPLE = 2048  # images that a median is taken of, where there are more


@dataclass(frozen=True)
class Found:
    """What a search found for U units: `scores`, image `indices` and flat `positions`, each `[U, k]`.

    Places that nothing fills hold index -1. asked: the target each unit came from. bands: of each column, for a
    spectrum.
    """

    units: tuple[Target, ...]
    asked: tuple[Target, ...]
    scores: Tensor
    indices: Tensor
    positions: Tensor
    bands: tuple[str, ...]
    scanned: Scanned


def search(
    handle: Handle,
    data: DataSet,
    targets: Sequence[Any],
    *,
    k: int,
    crop: Crop,
    band: Band,
    per_image: int = 1,
    seed: int = 0,
    **options: Any,
) -> Found:
    """Ranks the data set for every unit of the targets in one pass. options: of `scan`.

    With a store some channels of a layer are ranked among all of them, as a store holds them.
    """
    shape = first_shape(handle, data)
    pairs = [(target, unit) for target in map(as_target, targets) for unit in as_units(handle, target, shape)]
    units = [unit for _, unit in pairs]
    ranking = _Ranking(k, crop, band, per_image, seed)
    groups = [_Group(handle, shape, *one) for one in _grouped(handle, units, shape, crop)]
    if options.get("store") is not None:
        for group in groups:
            group.widen()
    statistics: dict[str, list[Statistic]] = {}
    joint = Joint()
    for group in groups:
        group.statistics = ranking.statistics()
        if group.kind == "joint":
            joint = Joint(group.units, group.statistics)
        else:
            several = statistics.setdefault(group.layer, [])
            several += group.statistics if group.kind == "channels" else [_Of(one, group) for one in group.statistics]
    scanned = scan(handle, data, statistics, joint=joint if joint.targets else None, **options)
    answers = [group.own(ranking.answer(group.statistics)) for group in groups]
    rows = torch.tensor([row for group in groups for row in group.rows]).argsort()
    scores, indices, positions = (torch.cat(same)[rows] for same in zip(*answers, strict=True))
    filled = (indices >= 0).any(0)  # fewer columns where there are fewer images
    return Found(
        tuple(units),
        tuple(target for target, _ in pairs),
        scores[:, filled],
        indices[:, filled],
        positions[:, filled],
        tuple(name for name, some in zip(ranking.bands, filled.tolist(), strict=False) if some),
        scanned,
    )


def as_units(handle: Handle, target: Target, shape: Shape) -> list[Target]:
    """The units a target names: all channels of a layer, else itself. Raises as `Handle.bind` does."""
    _bound(handle, target, shape)
    if len(target.terms) == 1:
        (weight, atom), layout = target.terms[0], None
        if isinstance(atom, Unit) and atom.channel is None and atom.direction is None:
            layout = handle.layer(atom.layer, shape).layout
        if layout is not None:
            units = [channel(atom.layers[0], index) for index in range(layout.channels)]
            return units if weight == 1 else [unit * weight for unit in units]
    return [target]


Answer = tuple[Tensor, Tensor, Tensor]  # scores, indices and positions [U, k]


# -- groups of units that are looked at together ----------------------------------------------------------------------


def _grouped(
    handle: Handle, units: Sequence[Target], shape: Shape, crop: Crop
) -> Iterator[tuple[Kind, str, list[int], list[Target]]]:
    """The units by kind and layer, with the place of each in the order asked."""
    groups: dict[tuple[Kind, str], tuple[list[int], list[Target]]] = {}
    for row, unit in enumerate(units):
        kind, layer = _kind(unit)
        if crop == "patch" and layer and not handle.layer(layer, shape).spatial:
            raise NotApplicable(
                f'{unit}: layer {layer!r} has one position, so there is no patch to cut; crop="image" shows the images'
            )
        rows, same = groups.setdefault((kind, layer), ([], []))
        rows.append(row)
        same.append(unit)
    for (kind, layer), (rows, same) in groups.items():
        channels = handle.layer(layer, shape).layout.channels if layer else 0  # type: ignore[union-attr]
        every = kind == "spread" and same == [channel(layer, index) for index in range(channels)]
        yield "channels" if every else kind, layer, rows, same


def _kind(unit: Target) -> tuple[Kind, str]:
    """Whether the unit has a value at each position of one layer, at one position, or for the image only."""
    atoms = [atom for _, atom in unit.terms]
    if len(unit.layers) != 1 or not all(isinstance(atom, Unit) for atom in atoms):
        return "joint", ""
    places = {atom.position for atom in atoms if isinstance(atom, Unit)}
    narrow = all(isinstance(atom, Unit) and (atom.channel is not None or atom.direction) for atom in atoms)
    if not narrow or len(places) != 1:
        return "joint", ""
    return ("spread" if places == {None} else "fixed"), unit.layers[0]


class _Group:
    """Units of one layer, or those asked of the whole pass. rows: their places in the order asked."""

    def __init__(
        self, handle: Handle, shape: Shape, kind: Kind, layer: str, rows: Sequence[int], units: Sequence[Target]
    ) -> None:
        self.kind, self.layer, self.rows, self.units = kind, layer, rows, tuple(units)
        self.bounds = [] if kind == "channels" else [_bound(handle, unit, shape) for unit in units]
        self.statistics: list[Any] = []
        self.chosen: list[int] | None = None  # channels, where it looks at all of them

    def widen(self) -> None:
        """Looks at all channels where it is of some."""
        atoms = [atom for unit in self.units for _, atom in unit.terms]
        places = [atom.channel for atom in atoms if isinstance(atom, Unit) and atom.channel is not None]
        if self.kind == "spread" and list(self.units) == [channel(self.layer, place) for place in places]:
            self.kind, self.chosen = "channels", places

    def own(self, answer: Answer) -> Answer:
        """Its units' part of an answer."""
        scores, indices, positions = answer
        if self.chosen is None:
            return answer
        return scores[self.chosen], indices[self.chosen], positions[self.chosen]

    def project(self, maps: Tensor) -> Tensor:
        """The layer's maps `[N, C, h, w]` as those of the units, `[N, U, h, w]`."""
        if self.kind == "channels":
            return maps
        return torch.stack([bound.map(self.layer, maps) for bound in self.bounds], 1)


def _bound(handle: Handle, target: Target, shape: Shape) -> Bound:
    return handle.bind(target, torch.empty(1, *shape))[0]


class _Of:
    """A statistic of units instead of channels."""

    def __init__(self, statistic: Statistic, group: _Group) -> None:
        self.statistic, self.group = statistic, group
        self.update, self.compute = statistic.update, statistic.compute
        self.state_dict, self.load_state_dict = statistic.state_dict, statistic.load_state_dict

    def look(self, maps: Tensor, indices: Tensor) -> Any:
        return self.statistic.look(self.group.project(maps), indices)

    def merge(self, other: _Of) -> None:
        self.statistic.merge(other.statistic)

    def fresh(self) -> _Of:
        return _Of(self.statistic.fresh(), self.group)

    @property
    def options(self) -> dict[str, Any]:
        units = list(map(str, self.group.units))
        return {"kind": type(self.statistic).__name__, **self.statistic.options, "units": units}


# -- ranking ----------------------------------------------------------------------------------------------------------


class Coldest(Top):
    """The k images whose largest value is smallest."""

    _options = ("k",)

    def __init__(self, k: int) -> None:
        super().__init__(k, largest=False)

    def look(self, maps: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        best, positions = maps.flatten(2).max(2)
        return -best[:, :, None], positions[:, :, None]


@dataclass(frozen=True)
class _Ranking:
    """What is collected for a group of units, and what is made of it."""

    k: int
    crop: Crop
    band: Band
    per_image: int
    seed: int

    def __post_init__(self) -> None:
        if self.crop not in ("patch", "image"):
            raise BadInput(f'crop is "patch" or "image"; got {self.crop!r}')
        if self.band not in ("max", "min", "middle", "spectrum"):
            raise BadInput(f'band is "max", "min", "middle" or "spectrum"; got {self.band!r}')
        if self.k < 1 or (self.band == "spectrum" and self.k < len(BANDS)):
            raise BadInput(f"k is at least {len(BANDS) if self.band == 'spectrum' else 1} here; got {self.k}")
        if self.per_image < 1:
            raise BadInput(f"per_image is at least 1; got {self.per_image}")
        if self.per_image > 1 and (self.crop == "image" or self.band not in ("max", "min")):
            raise BadInput('per_image above 1 needs crop="patch" and band "max" or "min"')

    @property
    def counts(self) -> list[int]:
        """How many columns each band of a spectrum has; the outer ones more, where they do not come out even."""
        least, more = divmod(self.k, len(BANDS))
        return [least + (place < more) for place in (2, 3, 4, 1, 0)]

    @property
    def bands(self) -> tuple[str, ...]:
        """The band of each column of a spectrum."""
        if self.band != "spectrum":
            return ()
        return tuple(name for name, count in zip(BANDS, self.counts, strict=True) for _ in range(count))

    def statistics(self) -> list[Statistic]:
        """Fresh ones for one group."""
        wanted: dict[Band, list[Band]] = {"spectrum": ["min", "middle", "max"]}
        return [self._statistic(band) for band in wanted.get(self.band, [self.band])]

    def _statistic(self, band: Band) -> Statistic:
        k = self.k if self.band == band else max(self.counts)
        if band == "middle":
            return Sampled(SAMPLE, seed=self.seed, at="random" if self.crop == "patch" else "max")
        if band == "min" and self.crop == "image":
            return Coldest(k)
        return Top(k, largest=band == "max", per_image=self.per_image)

    def answer(self, statistics: Sequence[Any]) -> Answer:
        """Best first, coldest first, or from left to right by activation."""
        found = [one.compute() for one in statistics]
        if self.band in ("max", "min"):
            return _columns(found[0])
        if self.band == "middle":
            indices, scores, positions = found[0]
            half = torch.full((scores.shape[1],), 0.5, dtype=torch.float64)
            return _reversed(_nearest(indices, scores, positions, half, self.k))
        return self._spectrum(*found)

    def _spectrum(self, low: Extremes, sample: tuple[Tensor, Tensor, Tensor], high: Extremes) -> Answer:
        """Five bands; "slightly" is a quarter of the way out beyond zero and the median, or beyond the median alone."""
        scores = sample[1]  # [R, U]
        below, above = (scores < 0).double().mean(0), (scores > 0).double().mean(0)
        half = torch.full_like(below, 0.5)
        low_side, high_side = (share.clamp(max=0.5).where(share > 0, half) for share in (below, above))
        shares = [0.75 * low_side, half, 1 - 0.75 * high_side]
        lowest, *between, highest = self.counts
        parts = [_first(_columns(low), lowest)]
        parts += [_nearest(*sample, share, count) for share, count in zip(shares, between, strict=True)]
        parts.append(_reversed(_first(_columns(high), highest)))
        scores, indices, positions = (torch.cat(same, 1) for same in zip(*parts, strict=True))
        return scores, indices, positions


def _columns(found: Extremes) -> Answer:
    return found.scores, found.indices, found.positions


def _first(answer: Answer, count: int) -> Answer:
    scores, indices, positions = (one[:, :count] for one in answer)
    return scores, indices, positions


def _nearest(indices: Tensor, scores: Tensor, positions: Tensor, shares: Tensor, count: int) -> Answer:
    """Of a sample `[R]`, `[R, U]`, `[R, U]` the images nearest to each unit's quantile `shares [U]`, by activation."""
    wide = scores.double()
    middle = wide.sort(0).values.gather(0, (shares * (len(indices) - 1)).round().long()[None])
    chosen = torch.argsort((wide - middle).abs(), dim=0, stable=True)[:count]  # [count, U]
    chosen = chosen.gather(0, torch.argsort(wide.gather(0, chosen), dim=0, stable=True)).T
    lacking = (0, count - chosen.shape[1])
    return (
        F.pad(scores.T.gather(1, chosen), lacking),
        F.pad(indices[chosen], lacking, value=-1),
        F.pad(positions.T.gather(1, chosen), lacking, value=-1),
    )


def _reversed(answer: Answer) -> Answer:
    """From right to left, what nothing fills still at the end."""
    count = int((answer[1] >= 0).any(0).sum())
    scores, indices, positions = (torch.cat([one[:, :count].flip(1), one[:, count:]], 1) for one in answer)
    return scores, indices, positions


# -- where they are in the picture ------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Where what was found is: `positions [U, k, 2]` in the map, the rest in pixels of the model's input.

    boxes: `[U, k, 4]`, as far as they lie in the image; outside: `[U, k, 4]`, what is cut off of the receptive field at
    each side; points: `[U, k, 2]`, the middle of the position; sizes: `[U, k, 2]`, of the images. What has no position
    has the whole image as its box, positions -1 and points NaN.
    """

    positions: Tensor
    boxes: Tensor
    outside: Tensor
    points: Tensor
    sizes: Tensor


def placed(handle: Handle, found: Found, *, without_gates: bool = False) -> Places:
    """The receptive field of each position found, exact for its channel."""
    extent = found.indices.shape
    places = Places(
        torch.full((*extent, 2), -1),
        torch.zeros(*extent, 4, dtype=torch.long),
        torch.zeros(*extent, 4, dtype=torch.long),
        torch.full((*extent, 2), torch.nan),
        torch.zeros(*extent, 2, dtype=torch.long),
    )
    rows: dict[str, list[int]] = {}
    for row, unit in enumerate(found.units):
        rows.setdefault(_kind(unit)[1], []).append(row)
    for shape, cells in _by_shape(found):
        places.sizes[cells] = torch.tensor(shape[1:])
        places.boxes[cells] = torch.tensor([0, 0, *shape[1:]])
        for layer, some in rows.items():
            of_layer = torch.zeros_like(cells)
            of_layer[some] = cells[some]
            if layer and of_layer.any():
                _place(handle, found, places, layer, shape, of_layer, without_gates)
    return places


def _by_shape(found: Found) -> Iterator[tuple[Shape, Tensor]]:
    """The shapes of the images found, and which of the cells `[U, k]` hold such images."""
    shapes: dict[Shape, list[int]] = {}
    for index in sorted(set(found.indices.flatten().tolist())):
        if index >= 0:
            shapes.setdefault(found.scanned.shape_of(index), []).append(index)
    for shape, indices in shapes.items():
        yield shape, torch.isin(found.indices, torch.tensor(indices))


def _place(
    handle: Handle, found: Found, places: Places, layer: str, shape: Shape, cells: Tensor, without_gates: bool
) -> None:
    """Fills in the cells `[U, k]` that units of one layer have in images of one shape."""
    stated = handle.layer(layer, shape)
    height, width = stated.layout.grid  # type: ignore[union-attr]
    units, flat = cells.nonzero()[:, 0].tolist(), found.positions[cells]
    own = torch.tensor([_own_place(found.units[unit], height, width) for unit in units])
    at = torch.where(own >= 0, own, flat)
    rows, columns = at // width, at % width
    places.positions[cells] = torch.stack([rows, columns], 1)
    middles = torch.stack([(rows + 0.5) * shape[1] / height, (columns + 0.5) * shape[2] / width], 1)
    if stated.spatial:
        known = fields(handle, layer, shape=shape, without_gates=without_gates)
        channels = [_channels(found.units[unit], known) for unit in units]
        theory, seen = (_boxes(known, channels, rows, columns, clipped=clipped) for clipped in (False, True))
        places.boxes[cells], places.outside[cells] = seen, (theory - seen).abs()
        whole = (seen == torch.tensor([0, 0, *shape[1:]])).all(1)
        middles = torch.where(whole[:, None], middles, (theory[:, :2] + theory[:, 2:]) / 2)
    places.points[cells] = middles


def _own_place(unit: Target, height: int, width: int) -> int:
    """The flat position a unit has by itself, -1 if it is where the map is largest."""
    atom = unit.terms[0][1]
    if not isinstance(atom, Unit) or atom.position is None:
        return -1
    row, column = atom.place(height, width)
    return row * width + column


def _channels(unit: Target, known: Fields) -> list[int]:
    """The channels a unit reads whose fields differ."""
    atoms = [atom for _, atom in unit.terms if isinstance(atom, Unit)]
    if not known.distinct:
        return [0]
    if any(atom.channel is None for atom in atoms):
        return list(range(known.channels))
    return sorted({atom.channel for atom in atoms if atom.channel is not None})


def _boxes(known: Fields, channels: Sequence[list[int]], rows: Tensor, columns: Tensor, *, clipped: bool) -> Tensor:
    """`[n, 4]`: the box around the fields of each one's channels."""
    boxes = known.boxes(torch.tensor([some[0] for some in channels]), rows, columns, clipped=clipped)
    for place, some in enumerate(channels):
        if len(some) > 1:
            row, column = rows[place].expand(len(some)), columns[place].expand(len(some))
            several = known.boxes(torch.tensor(some), row, column, clipped=clipped)
            boxes[place] = torch.cat([several[:, :2].amin(0), several[:, 2:].amax(0)])
    return boxes
