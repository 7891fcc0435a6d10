"""Which method of `explain` to use on a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchloupe._batch import several
from torchloupe._compare import METRICS, OF_MASKS, Options, compare
from torchloupe._explain import explain
from torchloupe._models import ModelLike, opened
from torchloupe_core.comparison import Comparison
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.targets import TargetLike

__all__ = ["CANDIDATES", "recommend"]

# One of each kind, with as many samples as a first look needs.
CANDIDATES: dict[str, Mapping[str, Any]] = {
    "grad_cam": {},
    "layer_cam": {},
    "ablation_cam": {},
    "attention_relevance": {},
    "guided_grad_cam": {},
    "captum.saliency": {},
    "captum.smooth_grad": {"n_samples": 8},
    "captum.input_x_gradient": {},
    "captum.guided_backprop": {},
    "captum.integrated_gradients": {"steps": 16},
    "captum.deep_lift": {},
    "captum.occlusion": {},
    "rise": {"n_masks": 500},
}


def recommend(
    model: ModelLike,
    images: Any,
    *,
    budget: float | None = None,
    methods: Sequence[str] | None = None,
    target: TargetLike | Sequence[TargetLike] | None = None,
    metrics: Sequence[str] | None = None,
    masks: Any = None,
    options: Options | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **asked: Any,
) -> Comparison:
    """The method of `explain` that does best on these images, with the comparison that says so.

    budget: seconds that one image may take; what takes longer is left out. methods: the candidates, one of each kind
    unless given. `recommended` in the result is the method of the best mean rank over the metrics among those that look
    at the model; of methods that are one, the quickest. A few dozen images will do. options, and what else: of
    `compare`. Raises `NotApplicable` where no candidate is left.
    """
    if budget is not None and not budget > 0:
        raise BadInput(f"budget is in seconds for an image, above 0; got {budget}")
    handle = opened(model, device=device, dtype=dtype)
    given = dict(options or {})
    names = list(CANDIDATES) if methods is None else list(methods)
    settings = {name: {**CANDIDATES.get(name, {}), **given.pop(name, {})} for name in names}
    fitting, dropped = _fitting(handle, images, settings, target, budget)
    if not fitting:
        raise NotApplicable("no method is left: " + "; ".join(f"{name}: {why}" for name, why in dropped.items()))
    judges = [*METRICS, *(OF_MASKS if masks is not None else ())] if metrics is None else list(metrics)
    found = compare(
        handle,
        images,
        methods=fitting,
        target=target,
        metrics=judges,
        masks=masks,
        options={**given, **{name: settings[name] for name in fitting if settings[name]}},
        **asked,
    )
    return replace(found, refused={**dropped, **found.refused}, recommended=_best(found))


def _fitting(
    handle: Handle, images: Any, settings: Mapping[str, Mapping[str, Any]], target: Any, budget: float | None
) -> tuple[list[str], dict[str, str]]:
    """The candidates that answer for the first image in time, and why the others do not."""
    sample = next(iter(open_data(several(images), handle.spec).samples()))
    if sample.inputs is None:
        raise BadInput(f"the first image cannot be read: {sample.error}")
    inputs = sample.inputs[None].to(handle.device, handle.dtype)
    first = target[:1] if isinstance(target, (list, tuple)) else target
    fitting, dropped = [], {}
    for name, options in settings.items():
        try:
            for _ in range(2 if budget is not None else 1):  # the first one prepares
                begun = time.perf_counter()
                explain(handle, inputs, target=first, method=name, progress=False, **options)
                seconds = time.perf_counter() - begun
        except (NotApplicable, MissingDependency) as refusal:
            dropped[name] = str(refusal)
            continue
        if budget is not None and seconds > budget:
            dropped[name] = f"takes {seconds:.2g} s for an image, above the budget of {budget:g} s"
        else:
            fitting.append(name)
    return fitting, dropped


def _best(found: Comparison) -> str:
    blind = {name for name, notes in found.notes.items() if any("looks at the model" in note for note in notes)}
    ranks = {name: rank for name, rank in found.mean_ranks().items() if name not in blind}
    if not ranks:
        return ""
    least = min(ranks.values())
    ties = [name for name, rank in ranks.items() if rank == least]
    return min(ties, key=lambda name: found.cost_seconds[found.methods.index(name)].item())
