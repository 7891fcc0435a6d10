"""Methods and backends side by side, judged by numbers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchloupe import __version__
from torchloupe._explain import explain
from torchloupe._masks import masks_of
from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.comparison import Comparison
from torchloupe_core.dataset import DataSet, open_data
from torchloupe_core.errors import BadInput, LoupeError, MissingDependency, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.identity import of_data, of_model
from torchloupe_core.memory import most_held
from torchloupe_core.metrics.alike import proportional, spearman, ssim, top_overlap
from torchloupe_core.metrics.case import Case, as_probability
from torchloupe_core.metrics.floors import FLOORS, floors
from torchloupe_core.query import Query
from torchloupe_core.registry import Method
from torchloupe_core.results import Attribution
from torchloupe_core.study import Kept
from torchloupe_core.targets import Target, TargetLike, as_targets, logit

__all__ = ["METHODS", "compare"]

METHODS = ("grad_cam", "captum.saliency", "captum.integrated_gradients", "captum.occlusion")
METRICS = ("insertion", "deletion", "average_drop", "sparsity", "randomisation")
OF_MASKS = ("pointing", "energy_pointing", "iou")
GROUP = 16  # images judged and kept together
SHOWN = 6
IGNORES = 0.5  # of rank correlation with the maps of a model that forgets
POOLED = (
    "on a layer that is averaged and read by one linear layer, these are the same but for a factor (Selvaraju 2017)"
)
CAMS = {"cam", "grad_cam", "hires_cam", "xgrad_cam"}

Options = Mapping[str, Mapping[str, Any]]


def compare(
    model: ModelLike,
    images: Any,
    *,
    methods: Sequence[str] = METHODS,
    target: TargetLike | Sequence[TargetLike] | None = None,
    metrics: Sequence[str] | None = None,
    masks: Any = None,
    across: Literal["backends"] | None = None,
    options: Options | None = None,
    layer: object = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: bool = False,
    store: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: bool | None = None,
) -> Comparison:
    """Methods of `explain` side by side: how faithful, how well they point, how stable, how dear, and how alike.

    images: a batch, a list, a folder or a data set. methods: of `tl.methods("explain")`, of any backend. metrics: of
    `tl.methods("compare")`; without them insertion, deletion, average drop, sparsity and parameter randomisation, and
    with masks the pointing games and IoU. target: one for all images or one each; else each image's predicted logit;
    where a logit is explained, its probability is scored. masks: where the object is, `[N, H, W]` bool, or a folder of
    pictures named like the images, white where it is. across: "backends" adds each method as every other backend that
    is installed has it, and notes how far their raw maps lie apart. options: by the name of a method or metric, as
    `{"rise": {"n_masks": 500}, "deletion": {"step": 8}}`. layer: for methods that read one. memory: measures the most
    that is held for one image. store: a folder to keep each 16 images' numbers in; the same call goes on there.

    Three maps that know nothing of the model, `random`, `centre` and `edges`, stand beside the methods. Maps are
    compared raw, at the images' resolution. A method that is refused for the model, and a metric that says nothing of a
    method, are left out and listed. Methods whose maps are one up to scale, and methods that hardly change as the
    model's weights are drawn anew, are named in `notes`. Raises `UnknownName`, `BadInput`, `StoreError`.
    """
    handle = opened(model, device=device, dtype=dtype)
    begun, forwards = time.perf_counter(), handle.forwards
    data = open_data(images, handle.spec)
    ways, judges = _chosen(_across(methods, across), metrics, masks, options or {}, layer)
    order = _order(data)
    asked = None if target is None else as_targets(target, len(order))
    made_by = _made_by(handle, data, ways, judges, asked, seed, masks) if store is not None else {}
    kept = Kept(None if store is None else Path(store), made_by)
    truth = masks_of(masks, data, order)
    found = []
    with progress_bar("compare", "images", progress) as report:
        for number, start in enumerate(range(0, len(order), GROUP)):
            chosen = order[start : start + GROUP]
            group = _Group(
                handle, data, ways, judges, seed, batch_size, not number, memory, skip_failures, bool(across)
            )
            some = None if asked is None else asked[start : start + GROUP]
            found.append(kept.group(number, partial(group.judged, chosen, some, truth)))
            report(min(start + GROUP, len(order)), len(order))
    return _joined(found, ways, judges, handle, seed, time.perf_counter() - begun, handle.forwards - forwards)


@dataclass(frozen=True)
class _Way:
    """A method or metric and the options it gets."""

    method: Method
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.method.name


@dataclass(frozen=True)
class _Again:
    """A method asked about variants of some images, each with the target of the image it is a variant of."""

    way: _Way
    handle: Handle
    targets: Sequence[Target]
    seed: int
    batch_size: int | None

    def explained(
        self, inputs: Tensor, targets: Sequence[Target], handle: Handle | None = None, seed: int | None = None
    ) -> Attribution:
        return explain(
            handle or self.handle,
            inputs,
            target=list(targets),
            method=self.way.name,
            seed=self.seed if seed is None else seed,
            batch_size=self.batch_size,
            progress=False,
            **self.way.options,
        )

    def __call__(
        self, inputs: Tensor, images: list[int], *, handle: Handle | None = None, seed: int | None = None
    ) -> Tensor:
        return self.explained(inputs, [self.targets[index] for index in images], handle, seed).upsample()


@dataclass(frozen=True)
class _Group:
    """Some images, explained by every method and judged by every metric."""

    handle: Handle
    data: DataSet
    ways: Sequence[_Way]
    judges: Sequence[_Way]
    seed: int
    batch_size: int | None
    first: bool
    measures: bool
    skip_failures: bool
    across: bool

    def judged(
        self, chosen: Sequence[int], asked: Sequence[Target] | None, truth: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        inputs, places, skipped = self._read(chosen)
        facts: dict[str, Any] = {"skipped": skipped, "refused": {}, "layers": {}, "targets": []}
        if not places:
            return {}, facts
        targets = self._predicted(inputs) if asked is None else [asked[place] for place in places]
        facts["targets"] = list(map(str, targets))
        masks = None if truth is None else truth([chosen[place] for place in places], inputs.shape[2:])
        cases, tensors = self._cases(inputs, targets, masks, facts)
        tensors["values"] = self._values(cases, facts)
        maps = {name: case.maps for name, case in cases.items()}
        tensors["agreement"], facts["alike"] = _agreement(list(maps.values()))
        facts["apart"] = _apart(maps) if self.across else {}
        tensors["maps"] = torch.stack([one[:SHOWN] for one in maps.values()])
        tensors["images"] = self.handle.spec.display(inputs[:SHOWN]).float().cpu()
        facts["methods"] = list(maps)
        return tensors, facts

    def _read(self, chosen: Sequence[int]) -> tuple[Tensor, list[int], dict[str, str]]:
        """The inputs that can be read, their places among the chosen, and why others cannot."""
        inputs, places, skipped = [], [], {}
        for place, index in enumerate(chosen):
            sample = self.data.read(index)
            if sample.inputs is None:
                if not self.skip_failures:
                    raise BadInput(f"{self.data.name(index)}: {sample.error}")
                skipped[self.data.name(index)] = str(sample.error)
                continue
            inputs.append(sample.inputs)
            places.append(place)
        if len({one.shape for one in inputs}) > 1:
            raise BadInput(
                "the images are of several sizes; a comparison needs one, so give a model with an input size"
            )
        found = torch.stack(inputs) if inputs else torch.empty(0)
        return found.to(self.handle.device, self.handle.dtype), places, skipped

    def _predicted(self, inputs: Tensor) -> list[Target]:
        return [logit(guesses[0].index) for guesses in self.handle.predict(inputs, k=1)]

    def _cases(
        self, inputs: Tensor, targets: Sequence[Target], masks: Tensor | None, facts: dict[str, Any]
    ) -> tuple[dict[str, Case], dict[str, Tensor]]:
        """Each method's maps, then those that know nothing of the model."""
        handle, shared = self.handle, dict[Any, Any]()
        judged = handle.bind([as_probability(one) for one in targets], inputs)
        query = Query(handle, inputs, judged, self.seed, None, self.batch_size)
        plain = Case(replace(query, targets=handle.bind(list(targets), inputs)), inputs)
        cases: dict[str, Case] = {}
        costs: list[list[float]] = []
        for way in self.ways:
            again = _Again(way, handle, targets, self.seed, self.batch_size)
            try:
                held = self._held(again, inputs[:1]) if self.first else 0.0  # which prepares what a method needs
                found = again.explained(inputs, targets)
            except (NotApplicable, MissingDependency) as refusal:
                if isinstance(refusal, MissingDependency) and not self.across:
                    raise
                facts["refused"][way.name] = str(refusal)
                continue
            costs.append([found.seconds, float(found.forwards), held])
            facts["layers"][way.name] = found.layer or ""
            cases[way.name] = Case(
                query, found.upsample(), way.method, found.per_channel, again, plain.score_variants, masks, shared
            )
        for name, maps in floors(self.handle.spec.display(inputs).float().cpu(), self.seed).items():
            cases[name] = Case(query, maps, masks=masks, shared=shared)
            costs.append([0.0, 0.0, float("nan")])
        return cases, {"costs": torch.tensor(costs)}

    def _held(self, again: _Again, inputs: Tensor) -> float:
        if not self.measures:
            again(inputs, [0])
            return float("nan")
        held = most_held(lambda: again(inputs, [0]), self.handle.device)
        return float("nan") if held is None else float(held)

    def _values(self, cases: Mapping[str, Case], facts: dict[str, Any]) -> Tensor:
        """`[M, K, n]`; NaN where a metric says nothing."""
        rows = []
        for name, case in cases.items():
            columns = []
            for judge in self.judges:
                try:
                    with self.handle.borrow():
                        columns.append(judge.method.run(case, **judge.options).float())
                except NotApplicable as refusal:
                    if name not in FLOORS:
                        facts["refused"][f"{name}, {judge.name}"] = str(refusal)
                    columns.append(torch.full((len(case),), torch.nan))
            rows.append(torch.stack(columns))
        return torch.stack(rows)


def _chosen(
    methods: Sequence[str], metrics: Sequence[str] | None, masks: Any, options: Options, layer: object
) -> tuple[list[_Way], list[_Way]]:
    """The methods and metrics of those names, each once. Raises `BadInput` for an option none of them has."""
    if isinstance(methods, str) or not methods:
        raise BadInput(f"methods is a list of names of methods of explain; got {methods!r}")
    names = [*METRICS, *(OF_MASKS if masks is not None else ())] if metrics is None else list(metrics)
    found = [
        list({way.name: way for way in (registry.find(verb, name) for name in asked)}.values())
        for verb, asked in (("explain", methods), ("compare", names))
    ]
    known = {way.name: way for several in found for way in several}
    given = {}
    for name, wanted in options.items():
        full = next((way.name for verb in ("explain", "compare") if (way := _found(verb, name)) is not None), name)
        if full not in known:
            raise BadInput(f"options are given for {name!r}, which is not compared; compared are {', '.join(known)}")
        known[full].check_options(wanted)
        given[full] = dict(wanted)
    placed = {} if layer is None else {"layer": layer}
    return (
        [_Way(way, {**given.get(way.name, {}), **(placed if "layer" in way.needs else {})}) for way in found[0]],
        [_Way(way, given.get(way.name, {})) for way in found[1]],
    )


def _across(methods: Sequence[str], across: str | None) -> Sequence[str]:
    """The methods, each followed by those that are the same in another backend."""
    if across not in (None, "backends"):
        raise BadInput(f'across is "backends" or None; got {across!r}')
    if across is None or isinstance(methods, str):
        return methods
    return [other for name in methods for other in registry.same_method("explain", name).values()]


def _found(verb: str, name: str) -> Method | None:
    try:
        return registry.find(verb, name)
    except LoupeError:
        return None


def _order(data: DataSet) -> list[int]:
    if data.order is None:
        raise BadInput("a stream of images has no length; give a comparison a folder, a list or a data set with one")
    return list(data.order)


def _made_by(
    handle: Handle,
    data: DataSet,
    ways: Sequence[_Way],
    judges: Sequence[_Way],
    asked: Sequence[Target] | None,
    seed: int,
    masks: Any,
) -> dict[str, Any]:
    return {
        **of_model(handle),
        **of_data(data),
        "methods": {way.name: {name: str(value) for name, value in way.options.items()} for way in ways},
        "metrics": {way.name: {name: str(value) for name, value in way.options.items()} for way in judges},
        "targets": "predicted" if asked is None else list(map(str, asked)),
        "seed": seed,
        "masks": "none" if masks is None else str(masks) if isinstance(masks, (str, os.PathLike)) else "given",
        "version": __version__,
    }


def _agreement(maps: Sequence[Tensor]) -> tuple[Tensor, list[list[int]]]:
    """`[3, M, M, n]`: rank correlation, overlap, structural similarity; and the pairs that are one up to scale."""
    count = len(maps)
    found = torch.ones(3, count, count, len(maps[0]))
    alike = []
    for i in range(count):
        for j in range(i + 1, count):
            both = torch.stack([measure(maps[i], maps[j]) for measure in (spearman, top_overlap, ssim)])
            found[:, i, j] = found[:, j, i] = both
            if proportional(maps[i], maps[j]):
                alike.append([i, j])
    return found, alike


def _apart(maps: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """For each method that an earlier one is the same as: which, their largest difference, the largest value."""
    found = {}
    for name in maps:
        first = (
            next((one for one in registry.same_method("explain", name).values() if one in maps), name)
            if (name not in FLOORS)
            else name
        )
        if first != name:
            found[name] = [first, float((maps[name] - maps[first]).abs().max()), float(maps[first].abs().max())]
    return found


def _joined(
    found: Sequence[tuple[dict[str, Tensor], dict[str, Any]]],
    ways: Sequence[_Way],
    judges: Sequence[_Way],
    handle: Handle,
    seed: int,
    seconds: float,
    forwards: int,
) -> Comparison:
    there = [(tensors, facts) for tensors, facts in found if tensors]
    skipped = {name: why for _, facts in found for name, why in facts["skipped"].items()}
    if not there:
        raise BadInput(f"none of the {len(skipped)} images could be read: {next(iter(skipped.values()), '')}")
    first, facts = there[0]
    names = tuple(facts["methods"])
    if any(tuple(other["methods"]) != names for _, other in there):
        raise BadInput("a method is refused for some of the images and not for others; compare those apart")
    refused = {name: why for _, one in reversed(there) for name, why in one["refused"].items()}
    if len(names) == len(FLOORS):
        raise NotApplicable("every method is refused: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
    values = torch.cat([tensors["values"] for tensors, _ in there], 2)
    costs = torch.stack([tensors["costs"] for tensors, _ in there])
    metrics = tuple(way.name for way in judges)
    agreement = torch.cat([tensors["agreement"] for tensors, _ in there], 3)
    same = set.intersection(*({tuple(pair) for pair in one["alike"]} for _, one in there))
    return Comparison(
        method="compare",
        backend="native",
        seed=seed,
        seconds=seconds,
        forwards=forwards,
        versions=versions(*dict.fromkeys(way.method.backend for way in ways)),
        options={**{way.name: dict(way.options) for way in (*ways, *judges) if way.options}},
        methods=names,
        baselines=FLOORS,
        metrics=metrics,
        better=tuple(way.method.better for way in judges),
        values=values,
        cost_seconds=costs[:, :, 0].sum(0) / values.shape[2],
        cost_forwards=costs[:, :, 1].sum(0) / values.shape[2],
        memory=costs[0, :, 2],
        layers=tuple(facts["layers"].get(name, "") for name in names),
        agreement=agreement.nanmean(3),
        maps=first["maps"],
        images=first["images"],
        targets=tuple(text for _, one in there for text in one["targets"]),
        refused=refused,
        notes=_notes(names, metrics, values, same, [one["apart"] for _, one in there]),
        skipped=skipped,
    )


def _notes(
    names: Sequence[str],
    metrics: Sequence[str],
    values: Tensor,
    same: set[tuple[int, ...]],
    apart: Sequence[Mapping[str, Sequence[Any]]],
) -> dict[str, list[str]]:
    """What the numbers alone do not tell: methods that are one, and methods that look past the model."""
    notes: dict[str, list[str]] = {}
    for i, j in sorted(same):
        pair = (names[i], names[j])
        bare = {name.split(".")[-1].replace("gradcam", "grad_cam") for name in pair}
        why = f"; {POOLED}" if bare <= CAMS and len(bare) > 1 else ""
        notes.setdefault(pair[0], []).append(f"the same maps as {pair[1]} up to scale{why}")
    for name, (first, *_) in apart[0].items():
        difference, largest = (max(one[name][place] for one in apart) for place in (1, 2))
        notes.setdefault(name, []).append(
            f"its raw maps lie at most {difference:.2g} from those of {first}, whose largest value is {largest:.2g}"
        )
    if "randomisation" in metrics:
        place = metrics.index("randomisation")
        for row, name in enumerate(names):
            alike = values[row, place].nanmean().item()
            if alike >= IGNORES:
                notes.setdefault(name, []).append(
                    f"hardly looks at the model: its maps stay alike ({alike:.2f} of 1) as the weights are drawn anew"
                )
    return notes
