"""Methods and backends side by side, judged by numbers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchloupe import __version__
from torchloupe._batch import several
from torchloupe._judging import Judging, Stored, Way
from torchloupe._masks import masks_of
from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.comparison import Comparison
from torchloupe_core.dataset import DataSet, open_data
from torchloupe_core.errors import BadInput, LoupeError, NotApplicable
from torchloupe_core.filling import filled
from torchloupe_core.identity import of_data, of_model
from torchloupe_core.metrics.floors import FLOORS
from torchloupe_core.registry import Method
from torchloupe_core.targets import TargetLike, as_targets
from torchloupe_core.writers import Crew

__all__ = ["METHODS", "compare"]

METHODS = ("grad_cam", "captum.saliency", "captum.integrated_gradients", "captum.occlusion")
METRICS = ("insertion", "deletion", "average_drop", "sparsity", "randomisation")
OF_MASKS = ("pointing", "energy_pointing", "iou", "corloc")
GROUP = 16  # images judged and kept together
IGNORES = 0.5  # of rank correlation with the maps of a model that forgets
POOLED = (
    "on a layer that is averaged and read by one linear layer, these are the same but for a factor (Selvaraju 2017)"
)
CAMS = {"cam", "grad_cam", "hires_cam", "xgrad_cam"}

Options = Mapping[str, Mapping[str, Any]]
Judged = tuple[Mapping[str, Tensor], Mapping[str, Any]]


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
    memory: bool | None = None,
    store: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    resume: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: bool | None = None,
) -> Comparison:
    """Methods of `explain` side by side: how faithful, how well they point, how stable, how dear, and how alike.

    images: one, a batch, a list, a folder or a data set. methods: of `tl.methods("explain")`, of any backend. metrics:
    of `tl.methods("compare")`; without them insertion, deletion, average drop, sparsity and parameter randomisation,
    and with masks the pointing games, IoU and CorLoc. target: one for all images or one each; else each image's
    predicted logit; where a logit is explained, its probability is scored. masks: where the object is, `[N, H, W]`
    bool, or a folder of pictures named like the images, white where it is. across: "backends" adds each method as every
    other backend that is installed has it, and notes how far their raw maps lie apart. options: by the name of a method
    or metric, as `{"rise": {"n_masks": 500}, "deletion": {"step": 8}}`. layer: for methods that read one. memory:
    whether the most that is held for one image is measured, as it is with `across` unless said otherwise.

    Three maps that know nothing of the model, `random`, `centre` and `edges`, stand beside the methods. Maps are
    compared raw, at the images' resolution. A method that is refused for the model, and a metric that says nothing of a
    method, are left out and listed. What methods do alike, as a gradient at a layer, is done once and counted for each.
    Methods whose maps are one up to scale, and methods that hardly change as the model's weights are drawn anew, are
    named in `notes`; maps that are one are judged once by metrics that do not mind the scale.

    store: a folder to keep each 16 images' numbers in; a comparison that was stopped in any way goes on there, and with
    resume=False a store that holds something is an error. Under `torchrun`, or wherever RANK and WORLD_SIZE are set,
    the processes share the work out through the store, and each gets the whole answer. engine: "ray" spreads it through
    Ray Data. Raises `UnknownName`, `BadInput`, and `StoreError` for a store of another question, naming what differs.
    """
    handle = opened(model, device=device, dtype=dtype)
    begun, forwards = time.perf_counter(), handle.forwards
    data = open_data(several(images), handle.spec)
    order = _order(data)
    ways, judges = _chosen(_across(methods, across), metrics, masks, options or {}, layer)
    work = Judging(
        handle,
        data,
        order,
        ways,
        judges,
        None if target is None else as_targets(target, len(order)),
        masks_of(masks, data, order),
        seed,
        batch_size,
        bool(across) if memory is None else memory,
        skip_failures,
        bool(across),
    )
    with progress_bar("compare", "images", progress) as report:
        if store is None and engine is None:
            found = list(_judged(work, report))
        else:
            found = _kept(work, store, engine, resume, masks, report)
    return _joined(found, work, time.perf_counter() - begun, handle.forwards - forwards)


def _judged(work: Judging, report: Callable[[int, int], None]) -> Iterator[Judged]:
    """Every group, in this process."""
    first = True
    for start in range(0, len(work.order), GROUP):
        places = range(start, min(start + GROUP, len(work.order)))
        found = work.group(places, first=first)
        first = first and not found[0]
        yield found
        report(places.stop, len(work.order))


def _kept(
    work: Judging,
    store: str | os.PathLike[str] | None,
    engine: str | None,
    resume: bool,
    masks: Any,
    report: Callable[[int, int], None],
) -> list[Judged]:
    """Every group out of a store, where those that it lacks are put first."""
    crew = Crew() if store is None else Crew.present()
    if engine is not None and crew.size > 1:
        raise BadInput(f"engine={engine!r} spreads a comparison by itself; leave it out under torchrun")
    spread = None if engine is None else registry.find("engine", engine).run
    with contextlib.ExitStack() as held:
        path = Path(held.enter_context(tempfile.TemporaryDirectory()) if store is None else store)
        whole = filled(
            path,
            _made_by(work, masks),
            {"block_size": GROUP},
            lambda opened: Stored(work, opened, work.handle),
            resume=resume,
            spread=spread,
            crew=crew,
            progress=report,
        )
        return [whole.read_whole(block) for block in range(whole.count)]


def _chosen(
    methods: Sequence[str], metrics: Sequence[str] | None, masks: Any, options: Options, layer: object
) -> tuple[list[Way], list[Way]]:
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
        [Way(way, {**given.get(way.name, {}), **(placed if "layer" in way.needs else {})}) for way in found[0]],
        [Way(way, given.get(way.name, {})) for way in found[1]],
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


def _made_by(work: Judging, masks: Any) -> dict[str, Any]:
    """What may not differ between runs of one store, as JSON has it."""
    facts = {
        **of_model(work.handle),
        **of_data(work.data),
        "methods": {way.name: {name: str(value) for name, value in way.options.items()} for way in work.ways},
        "metrics": {way.name: {name: str(value) for name, value in way.options.items()} for way in work.judges},
        "targets": "predicted" if work.asked is None else ", ".join(map(str, work.asked)),
        "seed": work.seed,
        "masks": "none" if masks is None else _told(masks),
        "memory measured": work.memory,
        "across backends": work.across,
        "version": __version__,
    }
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def _told(masks: Any) -> str:
    """The folder that masks are in, or a digest of those given."""
    if isinstance(masks, (str, os.PathLike)):
        return str(masks)
    given = torch.as_tensor(masks) != 0
    return hashlib.sha256(given.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _joined(found: Sequence[Judged], work: Judging, seconds: float, forwards: int) -> Comparison:
    there = [(tensors, facts) for tensors, facts in found if tensors]
    skipped = {name: why for _, facts in found for name, why in facts["skipped"].items()}
    if not there:
        raise BadInput(f"none of the {len(skipped)} images could be read: {next(iter(skipped.values()), '')}")
    if skipped and not work.skip_failures:  # in a store that was made without minding
        name, why = next(iter(skipped.items()))
        raise BadInput(f"{name}: {why}")
    first, facts = there[0]
    names = tuple(facts["methods"])
    if any(tuple(other["methods"]) != names for _, other in there):
        raise BadInput("a method is refused for some of the images and not for others; compare those apart")
    refused = {name: why for _, one in reversed(there) for name, why in one["refused"].items()}
    if len(names) == len(FLOORS):
        raise NotApplicable("every method is refused: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
    values = torch.cat([tensors["values"] for tensors, _ in there], 2)
    costs = torch.stack([tensors["costs"] for tensors, _ in there])
    metrics = tuple(way.name for way in work.judges)
    agreement = torch.cat([tensors["agreement"] for tensors, _ in there], 3)
    same = set.intersection(*({tuple(pair) for pair in one["alike"]} for _, one in there))
    return Comparison(
        method="compare",
        backend="native",
        seed=work.seed,
        seconds=seconds,
        forwards=forwards,
        versions=versions(*dict.fromkeys(way.method.backend for way in work.ways)),
        options={**{way.name: dict(way.options) for way in (*work.ways, *work.judges) if way.options}},
        methods=names,
        baselines=FLOORS,
        metrics=metrics,
        better=tuple(way.method.better for way in work.judges),
        values=values,
        cost_seconds=costs[:, :, 0].sum(0) / values.shape[2],
        cost_forwards=costs[:, :, 1].sum(0) / values.shape[2],
        cost_backwards=costs[:, :, 2].sum(0) / values.shape[2],
        memory=_largest(costs[:, :, 3]),
        layers=tuple(facts["layers"].get(name, "") for name in names),
        agreement=agreement.nanmean(3),
        maps=first.get("maps", torch.empty(len(names), 0, 1, 1)),
        images=first.get("images", torch.empty(0, 3, 1, 1)),
        targets=tuple(text for _, one in there for text in one["targets"]),
        refused=refused,
        notes=_notes(names, metrics, values, same, [one["apart"] for _, one in there]),
        skipped=skipped,
    )


def _largest(values: Tensor) -> Tensor:
    """`[M]` of `[groups, M]`, NaN where there is none."""
    found = values.nan_to_num(-1.0).amax(0)
    return found.where(found >= 0, torch.nan)


def _notes(
    names: Sequence[str],
    metrics: Sequence[str],
    values: Tensor,
    same: set[tuple[int, ...]],
    apart: Sequence[Mapping[str, Sequence[Any]]],
) -> dict[str, list[str]]:
    """What the numbers alone do not tell: methods that are one, and methods that look past the model."""
    notes: dict[str, list[str]] = {}
    twins = {j for _, j in same}
    for i in sorted({i for i, _ in same} - twins):
        others = [names[j] for one, j in sorted(same) if one == i]
        bare = {name.split(".")[-1] for name in (names[i], *others)}
        why = f"; {POOLED}" if bare <= CAMS and len(bare) > 1 else ""
        notes[names[i]] = [f"the same maps as {', '.join(others)} up to scale{why}"]
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
