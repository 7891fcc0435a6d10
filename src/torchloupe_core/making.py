"""From what was asked to a task for an engine, from what engines made to a result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.atoms import Unit
from torchloupe_core.errors import BadInput, LoupeError, NotApplicable
from torchloupe_core.handle import Handle, Reading, Shape
from torchloupe_core.images import Pixels
from torchloupe_core.pace import Pace, out_of_memory
from torchloupe_core.parametrizations import ParametrizationLike, as_parametrization
from torchloupe_core.preactivation import read_before_rectifier
from torchloupe_core.regularizers import RegularizersLike, as_regularizers
from torchloupe_core.targets import Bound, Target, TargetLike, as_targets
from torchloupe_core.task import Made, Read, Task
from torchloupe_core.terms import Alignment, Diversity, Term
from torchloupe_core.transforms import Crops, Transform, TransformsLike, as_transforms

__all__ = ["Size", "asked", "commissioned", "made_of", "opinions", "pictures"]

Size = int | tuple[int, int] | None

MOST_OPINIONS = 5
WARM, WARMEST = 4, 64  # units are read before their ReLU too in the first quarter of the steps, or the first 64


def asked(target: TargetLike | Sequence[TargetLike], n: int) -> list[Target]:
    """n times each target, one after the other."""
    if n < 1:
        raise BadInput(f"n is at least 1; got {n}")
    count = len(target) if isinstance(target, Sequence) and not isinstance(target, str) else 1
    if count == 0:
        raise BadInput("no targets were given")
    return [one for one in as_targets(target, count) for _ in range(n)]


def commissioned(
    handle: Handle,
    targets: Sequence[Target],
    *,
    n: int = 1,
    size: Size = None,
    init: Any = None,
    parametrization: ParametrizationLike = "fourier",
    transforms: TransformsLike = None,
    regularizers: RegularizersLike = None,
    diversity: float = 0.0,
    alignment: float = 0.0,
    terms: Sequence[Term] = (),
    compare: Any = None,
    read: Read = "auto",
    lr: float | None = None,
    steps: int = 512,
    snapshots: Sequence[int] = (),
    tile: tuple[int, int] | None = None,
    **options: Any,
) -> Task:
    """The task of making an image for each target, everything checked. The model is already borrowed.

    terms: more of them; compare: the images they compare with, given as `init` is, whose size is taken too. Either may
    be `Pixels`, of any size.
    """
    if steps < 1:
        raise BadInput(f"steps is at least 1; got {steps}")
    if read not in ("auto", "pre", "post"):
        raise BadInput(f'read is "auto", "pre" or "post"; got {read!r}')
    kind = as_parametrization(parametrization)
    looks = as_transforms("distill" if transforms is None else transforms)
    begin, given = (None if one is None else _pixels(handle, one) for one in (init, compare))
    shape = _shape(handle, size, begin if given is None else given)
    shown = _shown(handle, shape, looks) if tile is None else shape[1:]
    seen_shape = (shape[0], *(tile or shown))
    _require_runs(handle, seen_shape)
    if read == "pre":
        targets = [read_before_rectifier(handle, one, seen_shape) for one in targets]
    early = _early(handle, targets, seen_shape) if read == "auto" else []
    step_size = kind.lr if lr is None else lr
    if not 0 < step_size < float("inf"):
        raise BadInput(f"lr is above 0; got {lr}")
    kept = tuple(sorted(set(snapshots)))
    if kept and not 1 <= kept[0] <= kept[-1] <= steps:
        raise BadInput(f"snapshots are steps from 1 to {steps}; got {list(snapshots)}")
    return Task(
        handle,
        handle.bind(list(targets), torch.empty(len(targets), *seen_shape, device="meta")),
        shape,
        shown,
        kind,
        looks,
        as_regularizers(regularizers),
        (*terms, *_terms(handle, targets, n, seen_shape, diversity, alignment)),
        reference=None if given is None else _one_for_each(given, shape, len(targets), n),
        begin=None if begin is None else _one_for_each(begin, shape, len(targets), n),
        steps=steps,
        lr=step_size,
        redirect=read != "post",
        early=early,
        warm=min(steps, max(steps // WARM, WARMEST)) if early else 0,
        snapshots=kept,
        tile=tile,
        **options,
    )


def made_of(task: Task, engine: Callable[[Task], Made], batch_size: int | None) -> Made:
    """What an engine makes of a task, so many images at once; those that belong together always at once.

    A batch too large for the memory is halved and begun anew.
    """
    count, group, parts = len(task), task.group, []
    if batch_size is not None and not (batch_size >= 1 and (group == 1 or batch_size >= group)):
        raise BadInput(f"batch_size is at least {group}, as many as are compared with each other; got {batch_size}")
    size = Pace.beginning(*task.shown, task.handle.device).size if batch_size is None else batch_size
    pace = Pace(max(1, size // group), settled=True)
    try:
        for _, _, made in pace.run(count // group, lambda a, b: _part(task, engine, a * group, b * group)):
            parts.append(made)
            if made.interrupted:
                break
    except KeyboardInterrupt:  # in the first step of a later batch
        if not (task.interruptible and parts):
            raise
        parts[-1] = replace(parts[-1], stopped="interrupted", interrupted=True)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise BadInput(
            f"the memory does not suffice for {group} image{'s' * (group > 1)} of "
            f"{task.shape[1]}x{task.shape[2]}; give a smaller size="
        ) from error
    return _joined(parts)


def opinions(task: Task, made: Made) -> dict[str, Any]:
    """What other units think of the images: `seen_as`, the classes seen first, and `units`, the channels of the layer
    the target reads that answer most on average; each `[name, value]`, for each image."""
    found: dict[str, list[Any]] = {"seen_as": [], "units": []}
    layers = [next((a.layer for _, a in one.terms if isinstance(a, Unit)), None) for one in task.targets]
    shape = (task.shape[0], *task.shown)
    classifies = task.handle.trace(shape).form == "logits"
    for image, layer in zip(made.images, layers, strict=False):
        inputs = _shown_inputs(task, image[None])
        with task.handle.watch(*([] if layer is None else [layer]), through=classifies, shape=shape) as watch:
            if not classifies and layer is None:
                return {}
            reading = Reading(task.handle, watch, watch(inputs))
            if classifies:
                names = _strongest(reading.logits()[0])
                found["seen_as"].append([[task.handle.name_of(index), value] for index, value in names])
            if layer is not None:
                answers = _strongest(reading.map(layer)[0].mean((1, 2)))
                found["units"].append([[f"{layer}:{index}", value] for index, value in answers])
            else:
                found["units"].append([])
    return {name: each for name, each in found.items() if any(each)}


def pictures(images: Tensor) -> Tensor:
    """Images of any number of channels as `[n, 3, H, W]`: grey ones in all three, of more than three the first."""
    images = images[:, :1] if images.shape[1] < 3 else images[:, :3]
    return images.expand(-1, 3, -1, -1).contiguous()


def _part(task: Task, engine: Callable[[Task], Made], start: int, stop: int) -> Made:
    """Some of the images. Progress counts the steps of all images alike."""
    share, done, total = stop - start, start * task.steps, len(task) * task.steps

    def report(step: int, _: int, note: str) -> None:
        task.report(done + share * step, total, note)

    return engine(replace(task.only(start, stop), report=report))


def _joined(parts: Sequence[Made]) -> Made:
    """The parts as one. A run that ended early has no losses from then on."""
    longest = max(part.losses.shape[1] for part in parts)
    losses = [F.pad(part.losses, (0, longest - part.losses.shape[1]), value=float("nan")) for part in parts]
    steps = set.intersection(*(set(part.snapshots) for part in parts))
    return Made(
        torch.cat([part.images for part in parts]),
        torch.cat([part.scores for part in parts]),
        torch.cat(losses),
        None if parts[0].alpha is None else torch.cat([part.alpha for part in parts if part.alpha is not None]),
        {step: torch.cat([part.snapshots[step] for part in parts]) for step in sorted(steps)},
        tuple(count for part in parts for count in part.redirected),
        "; ".join(dict.fromkeys(part.stopped for part in parts if part.stopped)),
        any(part.interrupted for part in parts),
    )


def _pixels(handle: Handle, given: Any) -> Tensor:
    """Images of any kind as pixels `[N, C, H, W]` in [0, 1]."""
    return given.values if isinstance(given, Pixels) else handle.spec.pixels(handle.inputs(given))


def _shape(handle: Handle, size: Size, begin: Tensor | None) -> Shape:
    """(C, H, W) of the images."""
    if size is None:
        return handle.input_shape if begin is None else (begin.shape[1], begin.shape[2], begin.shape[3])
    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(size, bool) or min(height, width) < 1:
        raise BadInput(f"size is a number of pixels, or (H, W), each at least 1; got {size!r}")
    return handle.spec.channels or (3 if begin is None else begin.shape[1]), height, width


def _shown(handle: Handle, shape: Shape, transforms: Sequence[Transform]) -> tuple[int, int]:
    """(h, w) of what the network sees: the image's own size, unless the model takes one size only or sees crops."""
    spec = handle.spec
    if spec.input_size is not None and (spec.fixed_size or any(isinstance(one, Crops) for one in transforms)):
        return spec.input_size[1:]
    return shape[1:]


def _require_runs(handle: Handle, shape: Shape) -> None:
    """Raises `BadInput` where the model fails on an input of this shape."""
    try:
        handle.trace(shape)
    except LoupeError:
        raise
    except Exception as error:
        problem = (str(error) or repr(error)).splitlines()[0]
        own = handle.spec.input_size
        hint = "" if own is None or own == shape else f"; its own size is {'x'.join(map(str, own))}"
        raise BadInput(f"the model fails on an input of {'x'.join(map(str, shape))}: {problem}{hint}") from error


def _early(handle: Handle, targets: Sequence[Target], shape: Shape) -> list[Bound]:
    """The targets with each unit read before its ReLU where there is such a place; none if that changes nothing."""
    found = {}
    for one in dict.fromkeys(targets):
        with contextlib.suppress(NotApplicable):
            found[one] = read_before_rectifier(handle, one, shape)
    early = [found.get(one, one) for one in targets]
    if early == list(targets):
        return []
    return handle.bind(early, torch.empty(len(early), *shape, device="meta"))


def _one_for_each(begin: Tensor, shape: Shape, count: int, n: int) -> Tensor:
    """`[count, C, H, W]`: one image given begins all, n begin the images of each target, count are one for each."""
    if begin.shape[2:] != shape[1:]:
        begin = F.interpolate(begin, size=shape[1:], mode="bilinear", align_corners=False, antialias=True)
    if len(begin) not in (1, n, count):
        raise BadInput(f"init holds {len(begin)} images for {count}; give one for all, or one for each")
    return begin.repeat(count // len(begin), 1, 1, 1)


def _terms(
    handle: Handle, targets: Sequence[Target], n: int, shape: Shape, diversity: float, alignment: float
) -> tuple[Term, ...]:
    terms: list[Term] = []
    if diversity:
        if n < 2:
            raise BadInput("diversity compares the images of one target; make several with n=")
        terms.append(Diversity(_compared(handle, targets, shape), diversity, n))
    if alignment:
        if len(targets) < 2:
            raise BadInput("alignment compares neighbouring images; give several targets, as tl.interpolate does")
        terms.append(Alignment(_compared(handle, targets, shape), alignment, len(targets)))
    return tuple(terms)


def _compared(handle: Handle, targets: Sequence[Target], shape: Shape) -> tuple[str, ...]:
    """The layers where images are compared: those that targets read, or the last spatial one."""
    found = dict.fromkeys(name for one in targets for name in one.layers)
    return tuple(found) or (handle.features_at(shape),)


def _shown_inputs(task: Task, images: Tensor) -> Tensor:
    handle = task.handle
    if tuple(images.shape[2:]) != task.shown:
        images = F.interpolate(images, size=task.shown, mode="bilinear", align_corners=False, antialias=True)
    return handle.spec.normalised(images).to(handle.device, handle.dtype)


def _strongest(values: Tensor) -> list[tuple[int, float]]:
    best = values.float().topk(min(MOST_OPINIONS, len(values)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
