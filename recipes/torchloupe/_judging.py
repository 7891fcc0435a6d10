"""Images explained by several methods and judged by several metrics, in groups: what a comparison is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchloupe._batch import read_batch
from torchloupe._explain import explained, predicted
from torchloupe_core import registry
from torchloupe_core.blocks import Done
from torchloupe_core.borrow import kept_threads
from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import MissingDependency, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.memory import most_held
from torchloupe_core.metrics.alike import Windows, correlation, proportional, ranks, top_overlap
from torchloupe_core.metrics.case import Case, as_probability
from torchloupe_core.metrics.floors import FLOORS, floors
from torchloupe_core.query import Query
from torchloupe_core.registry import Method
from torchloupe_core.results import Attribution
from torchloupe_core.scan import Report
from torchloupe_core.shared import Shared
from torchloupe_core.store import Store, packed
from torchloupe_core.targets import Target

__all__ = ["SHOWN", "Judging", "Stored", "Way"]

SHOWN = 6  # images, of the first group, whose maps are kept

Judged = tuple[dict[str, Tensor], dict[str, Any]]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Way:
    """A method or metric and the options it gets."""

    method: Method
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.method.name


@dataclass(frozen=True)
class Judging:
    """What it takes to judge groups of images, in this process or, sent there, in another.

    order: the indices of the images; a group is some places in it. asked: a target for each of them, else what the
    model predicts. truth: masks of images of these indices, in that size.
    """

    handle: Handle
    data: DataSet
    order: Sequence[int]
    ways: Sequence[Way]
    judges: Sequence[Way]
    asked: Sequence[Target] | None
    truth: Callable[[Sequence[int], tuple[int, int]], Tensor] | None
    seed: int
    batch_size: int | None
    memory: bool
    skip_failures: bool
    across: bool

    def group(self, places: range, *, first: bool) -> Judged:
        """What is found of some images. first: to be read by this process, which prepares what methods need."""
        chosen = [self.order[place] for place in places]
        batch = read_batch(self.handle, self.data, chosen, asking="a comparison", skip_failures=self.skip_failures)
        facts: dict[str, Any] = {"skipped": batch.skipped, "refused": {}, "layers": {}, "targets": [], "methods": []}
        if not len(batch):
            return {}, facts
        inputs, asked = batch.inputs, self.asked
        targets = predicted(self.handle, inputs) if asked is None else [asked[places[one]] for one in batch.places]
        facts["targets"] = list(map(str, targets))
        masks = None
        if self.truth is not None:
            masks = self.truth(batch.indices, (inputs.shape[2], inputs.shape[3]))
        cases, costs = self._cases(inputs, targets, masks, facts, places.start, first)
        maps = {name: case.maps for name, case in cases.items()}
        agreement, alike = _agreement(list(maps.values()))
        facts |= {"methods": list(maps), "alike": alike, "apart": _apart(maps) if self.across else {}}
        tensors = {"costs": costs, "agreement": agreement, "values": self._values(cases, alike, facts)}
        if not places.start:
            tensors["maps"] = torch.stack([one[:SHOWN] for one in maps.values()])
            tensors["images"] = self.handle.spec.display(inputs[:SHOWN]).float().cpu()
        return tensors, facts

    def _cases(
        self,
        inputs: Tensor,
        targets: Sequence[Target],
        masks: Tensor | None,
        facts: dict[str, Any],
        place: int,
        first: bool,
    ) -> tuple[dict[str, Case], Tensor]:
        """Each method's maps, then those that know nothing of the model; and what they took, `[M, 4]`."""
        handle, shared = self.handle, dict[Any, Any]()
        judged = handle.bind([as_probability(one) for one in targets], inputs)
        query = Query(handle, inputs, judged, self.seed, None, self.batch_size)
        plain = replace(query, targets=handle.bind(list(targets), inputs))
        cases: dict[str, Case] = {}
        costs: list[list[float]] = []
        alike = Counter(way.method.shares for way in self.ways)
        done = Shared()
        for way in self.ways:
            again = _Again(way, handle, targets, self.seed, self.batch_size)
            try:
                held = self._held(again, inputs[:1]) if first else float("nan")
                if way.method.shares and alike[way.method.shares] > 1:
                    again = replace(again, shared=done)
                found = again.explained(inputs, targets)
            except (NotApplicable, MissingDependency) as refusal:
                if isinstance(refusal, MissingDependency) and not self.across:
                    raise
                facts["refused"][way.name] = str(refusal)
                continue
            costs.append([found.seconds, float(found.forwards), float(found.backwards), held])
            facts["layers"][way.name] = found.layer or ""
            cases[way.name] = Case(
                query,
                found.upsample(),
                way.method,
                found.per_channel,
                again,
                plain,
                masks,
                shared,
                place,
            )
        for name, maps in floors(handle.spec.display(inputs).float().cpu(), self.seed + place).items():
            cases[name] = Case(query, maps, explained=plain, masks=masks, shared=shared)
            costs.append([0.0, 0.0, 0.0, float("nan")])
        return cases, torch.tensor(costs)

    def _held(self, again: _Again, inputs: Tensor) -> float:
        """The most bytes held for one image, where that is asked; what a method needs is prepared by it."""
        if not self.memory:
            again(inputs, [0])
            return float("nan")
        held = most_held(lambda: again(inputs, [0]), self.handle.device)
        return float("nan") if held is None else float(held)

    def _values(self, cases: Mapping[str, Case], alike: Sequence[Pair], facts: dict[str, Any]) -> Tensor:
        """`[M, K, n]`; NaN where a metric says nothing. Maps that are one up to scale are judged once."""
        names = list(cases)
        values = torch.full((len(names), len(self.judges), len(next(iter(cases.values())))), torch.nan)
        for row, name in enumerate(names):
            twin = next((names[one] for one, other in alike if other == row and _shared_alike(cases, one, row)), None)
            for column, judge in enumerate(self.judges):
                if twin is not None and judge.method.any_scale:
                    values[row, column] = values[names.index(twin), column]
                    refusal = facts["refused"].get(f"{twin}, {judge.name}")
                else:
                    refusal = self._judged(cases[name], judge, values[row, column])
                if refusal is not None and name not in FLOORS:
                    facts["refused"][f"{name}, {judge.name}"] = refusal
        return values

    def _judged(self, case: Case, judge: Way, values: Tensor) -> str | None:
        """Fills in `values [n]`, or says why the metric says nothing of the method."""
        try:
            with self.handle.borrow():
                values[:] = judge.method.run(case, **judge.options)
        except NotApplicable as refusal:
            return str(refusal)
        return None


@dataclass(frozen=True)
class Stored:
    """The same, whose groups are the blocks of a store."""

    judging: Judging
    store: Store
    handle: Handle
    workers: int | None = None

    def run(self, blocks: Iterable[int], done: Done, progress: Report = lambda done, total: None) -> None:
        """Judges groups one after the other and hands each over as the bytes that are stored."""
        with kept_threads(self.store.computing["threads"]):
            first = True
            for block in blocks:
                tensors, facts = self.judging.group(self.store.positions(block), first=first)
                first = first and not tensors
                done(block, packed(tensors, {**facts, "block": block, "store": self.store.digest}))
                progress(0, 0)


@dataclass(frozen=True)
class _Again:
    """A method asked about variants of some images, each with the target of the image it is a variant of."""

    way: Way
    handle: Handle
    targets: Sequence[Target]
    seed: int
    batch_size: int | None
    shared: Shared | None = None

    def explained(
        self, inputs: Tensor, targets: Sequence[Target], handle: Handle | None = None, seed: int | None = None
    ) -> Attribution:
        handle, options = handle or self.handle, dict(self.way.options)
        layer = options.pop("layer", None)
        return explained(
            handle,
            handle.inputs(inputs),
            self.way.method,
            options,
            target=list(targets),
            layer=None if layer is None else str(layer),
            seed=self.seed if seed is None else seed,
            batch_size=self.batch_size,
            shared=self.shared,
        )

    def __call__(
        self, inputs: Tensor, images: list[int], *, handle: Handle | None = None, seed: int | None = None
    ) -> Tensor:
        return self.explained(inputs, [self.targets[index] for index in images], handle, seed).upsample()


def _shared_alike(cases: Mapping[str, Case], one: int, other: int) -> bool:
    """Whether two methods whose maps are one share them out among the channels alike, or not at all."""
    first, second = (list(cases.values())[place].attributed for place in (one, other))
    if first is None or second is None:
        return first is second
    return proportional(first, second)


def _agreement(maps: Sequence[Tensor]) -> tuple[Tensor, list[Pair]]:
    """`[3, M, M, n]`: rank correlation, overlap, structural similarity; and the pairs that are one up to scale."""
    count, ranked, windows = len(maps), [ranks(one) for one in maps], [Windows(one) for one in maps]
    found = torch.ones(3, count, count, len(maps[0]))
    alike = []
    for i in range(count):
        for j in range(i + 1, count):
            orders, highest = correlation(ranked[i], ranked[j]), top_overlap(maps[i], maps[j])
            found[:, i, j] = found[:, j, i] = torch.stack([orders, highest, windows[i].similarity(windows[j])])
            if proportional(maps[i], maps[j]):
                alike.append((i, j))
    return found, alike


def _apart(maps: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """For each method that an earlier one is the same as: which, their largest difference, the largest value."""
    found = {}
    for name in (one for one in maps if one not in FLOORS):
        first = next((one for one in registry.same_method("explain", name).values() if one in maps), name)
        if first != name:
            found[name] = [first, float((maps[name] - maps[first]).abs().max()), float(maps[first].abs().max())]
    return found
