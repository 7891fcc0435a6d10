"""Where in the image the target came from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.query import Query
from torchloupe_core.registry import Method
from torchloupe_core.results import Attribution, texts
from torchloupe_core.shared import Cost, Shared
from torchloupe_core.spec import OutputSelector
from torchloupe_core.targets import Bound, Target, TargetLike, as_targets, logit

__all__ = ["explain", "explained", "predicted"]


def _unheard(done: int, total: int) -> None:
    """Progress of a step too short to report."""


def explain(
    model: ModelLike,
    images: Any,
    *,
    target: TargetLike | Sequence[TargetLike] | torch.Tensor | None = None,
    method: str = "grad_cam",
    layer: object = None,
    output: OutputSelector | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Attribution:
    """Where in each image the target came from, by one of `tl.methods("explain")`.

    target: one for all images or a list with one each; without it each image's predicted logit, which detectors and
    segmentation models do not have: they are asked with `tl.box_score` and `tl.region`. layer: where methods
    that read a layer look; without it the last spatial layer the target depends on, stated in the result. options: of
    the method. dtype, memory_format: `torch.bfloat16` and `torch.channels_last` ask a copy of the model, on many CPUs
    in a third of the time; maps of layers keep two digits, gradients at the input fewer. batch_size: found while
    working; with another, sums differ by rounding. Raises `NotApplicable` where the method would be vacuous or wrong
    on this model, saying what works.
    """
    way = registry.find("explain", method)
    way.check_options(options)
    if layer is not None and "layer" not in way.needs:
        raise BadInput(f"{way.name} reads the input, not a layer; leave out layer={str(layer)!r}")
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"batch_size is at least 1; got {batch_size}")
    handle = opened(model, device=device, dtype=dtype, memory_format=memory_format, output=output)
    inputs = handle.inputs(images)
    with progress_bar(way.name, "images", progress) as report:
        return explained(
            handle,
            inputs,
            way,
            options,
            target=target,
            layer=None if layer is None else str(layer),
            seed=seed,
            batch_size=batch_size,
            progress=report,
        )


def explained(
    handle: Handle,
    inputs: torch.Tensor,
    way: Method,
    options: Mapping[str, Any],
    *,
    target: TargetLike | Sequence[TargetLike] | torch.Tensor | None,
    layer: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = _unheard,
    shared: Shared | None = None,
) -> Attribution:
    """The same of model inputs `[N, C, H, W]`. What is found done in `shared` counts as if the method had done it."""
    begun, forwards, backwards = time.perf_counter(), handle.forwards, handle.backwards
    spared = Cost() if shared is None else shared.begin()
    with handle.borrow():
        asked = as_targets(predicted(handle, inputs) if target is None else target, len(inputs))
        query = Query(handle, inputs, handle.bind(asked, inputs), seed, layer, batch_size, progress, shared)
        found = way.run(query, **options)
        scores = found.scores
        if scores is None:
            silent = replace(query, progress=_unheard)
            each = query.once("scores", inputs, lambda: silent.each(lambda part: part.score(part.inputs)))
            scores = torch.cat(each)
    values = found.values.detach().float().cpu()
    if not values.isfinite().all():
        raise BadInput(f"{way.name} gave NaN or infinity; the model's gradients or activations are not finite here")
    _require_detections(query.targets, scores)
    return Attribution(
        method=way.name,
        backend=way.backend,
        seed=seed,
        seconds=time.perf_counter() - begun + spared.seconds,
        forwards=handle.forwards - forwards + spared.forwards,
        backwards=handle.backwards - backwards + spared.backwards,
        versions=versions(way.backend),
        options={**way.options, **options},
        values=values,
        images=handle.spec.display(inputs),
        scores=scores.detach().float().cpu(),
        target=texts(asked),
        layer=found.layer,
        signed=way.signed,
        per_channel=None if found.per_channel is None else found.per_channel.detach().float().cpu(),
        diagnostics=dict(found.diagnostics),
        standard_error=None if found.standard_error is None else found.standard_error.detach().float().cpu(),
        outputs=found.outputs,
        classes=None if found.outputs is None else handle.classes,
    )


def predicted(handle: Handle, inputs: torch.Tensor) -> list[Target]:
    """The logit of each image's most probable class, by name where the name is its own."""
    best = [guesses[0] for guesses in handle.predict(inputs, k=1)]
    names = handle.classes or ()
    return [logit(guess.name if names.count(guess.name) == 1 else guess.index) for guess in best]


def _require_detections(targets: Sequence[Bound], scores: torch.Tensor) -> None:
    """Where nothing was detected to ask about, a map would be zeros or the noise of its perturbations."""
    missed = [index for index, one in enumerate(targets) if one.detects and not scores[index]]
    if missed:
        raise BadInput(f"nothing is detected that fits {targets[missed[0]].target}, in image {missed[0]}")
