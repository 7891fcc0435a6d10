"""Images made to move a target."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.making import Size, asked, commissioned, made_of, opinions, pictures
from torchloupe_core.parametrizations import ParametrizationLike
from torchloupe_core.prior import Prior, as_prior
from torchloupe_core.registry import Method
from torchloupe_core.regularizers import RegularizersLike
from torchloupe_core.results import texts
from torchloupe_core.targets import Target, TargetLike
from torchloupe_core.task import Made, Read, Task
from torchloupe_core.transforms import TransformsLike
from torchloupe_core.visualization import Visualization

__all__ = ["rendered", "visualization", "visualize"]

PREFERRED = ("lucent", "native")  # what "auto" tries, in order


def visualize(
    model: ModelLike,
    target: TargetLike | Sequence[TargetLike],
    *,
    n: int = 1,
    steps: int = 512,
    size: Size = None,
    method: str = "auto",
    parametrization: ParametrizationLike = "fourier",
    transforms: TransformsLike = None,
    regularizers: RegularizersLike = None,
    init: Any = None,
    prior: Prior | nn.Module | None = None,
    diversity: float = 0.0,
    alignment: float = 0.0,
    read: Read = "auto",
    lr: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    snapshots: Sequence[int] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    precision: torch.dtype | None = None,
    compile: bool | str = False,
    interruptible: bool = False,
    progress: bool | None = None,
) -> Visualization:
    """n images made to move each target as far as it goes, from noise (Olah et al. 2017, Feature Visualization).

    target: one or a list, n images each, in order. size: of the images, the model's own unless given, in pixels or
    (H, W); a model of one size only is shown them resized. init: images to begin from instead of noise, pictures or
    model inputs: one for all, n for each target's, or one for each. method: "lucent" and "native" make the same images;
    "auto" is Lucent where it is installed and can do what is asked, and the result says which it was.

    parametrization: "fourier", "pixel", "pyramid", "lowres", "shared", "cppn", or one of `tl.parametrizations`.
    prior: a generator instead, a `torch.nn.Module` from codes to images or a `tl.Prior`; its code is optimised.
    transforms: "distill" unless given, "yosinski", "none", or a list of `tl.transforms`. regularizers: none unless
    given, "yosinski", a dict as {"tv": 0.1, "l2": 0.01}, or a list of `tl.regularizers`. diversity: weight of the
    penalty on likeness among the n images of a target; alignment: on unlikeness of neighbouring images, for a list as
    `tl.interpolate` gives it; both at the layers that the targets read.

    read: where a unit is behind a ReLU. "auto" counts what goes into the ReLU too in the first quarter of the steps,
    and wherever an image's gradient is zero redirects it, as Lucid does, so that a unit that is off can be switched
    on; "pre" asks for what goes into the ReLU; "post" takes the target as it is. lr: of Adam, 0.05 unless the
    parametrisation has its own. snapshots: steps after which images are kept. batch_size: of images at once, which
    makes no difference but in rounding. memory_format: `torch.channels_last` may be faster; precision: as
    `torch.bfloat16`, of autocast. compile: forward and backward pass by `torch.compile`, once for each batch size; or
    the name of its backend. interruptible: Ctrl-C ends the run early and what was made is returned.

    Where the target becomes NaN the run stops, the images are the last good ones, and `stopped` says at which step.
    Raises `NotApplicable` for a target without a gradient, `BadInput` for a size that model or memory do not allow.
    """
    if prior is not None:
        if parametrization != "fourier":
            raise BadInput("with prior= the generator makes the images; leave out parametrization=")
        parametrization = as_prior(prior)
    options = {"size": size, "init": init, "parametrization": parametrization, "transforms": transforms}
    options |= {"regularizers": regularizers, "diversity": diversity, "alignment": alignment, "read": read, "lr": lr}
    options |= {"snapshots": snapshots, "precision": precision, "compile": compile, "interruptible": interruptible}
    handle = opened(model, device=device, dtype=dtype, memory_format=memory_format)
    return rendered(
        handle,
        asked(target, n),
        method=method,
        batch_size=batch_size,
        progress=progress,
        n=n,
        steps=steps,
        seed=seed,
        memory_format=memory_format,
        **options,
    )


def rendered(
    handle: Handle,
    wanted: Sequence[Target],
    *,
    method: str = "auto",
    batch_size: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Visualization:
    """An image for each target, by an engine. options: of the task, see `making.commissioned`."""
    begun, forwards = time.perf_counter(), handle.forwards
    with handle.borrow(), progress_bar("visualize", "steps", progress) as report:
        task = commissioned(handle, wanted, report=report, **options)
        way, made = _made(task, method, batch_size)
        thoughts = opinions(task, made)
    given = task.begin if task.reference is None else task.reference
    return visualization(
        made,
        wanted,
        way,
        given=given,
        seed=task.seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        options={**task.options, "read": options.get("read", "auto")},
        diagnostics={"redirected": list(made.redirected), **thoughts},
    )


def visualization(
    made: Made, wanted: Sequence[Target], way: Method, *, given: Tensor | None, **facts: Any
) -> Visualization:
    """What was made as a result. given: the images `[n, C, H, W]` it was made from; facts: fields of a result."""
    n = len(made.images)  # fewer than were wanted, if interrupted
    return Visualization(
        method=way.name,
        backend=way.backend,
        versions=versions(way.backend),
        images=pictures(made.images),
        target=texts(wanted[:n]),
        losses=made.losses,
        alpha=made.alpha,
        given=None if given is None else pictures(given[:n].float().cpu()),
        snapshots=torch.stack([pictures(one) for one in made.snapshots.values()]) if made.snapshots else None,
        snapshot_steps=tuple(made.snapshots),
        stopped=made.stopped,
        **{"scores": made.scores, **facts},
    )


def _made(task: Task, method: str, batch_size: int | None) -> tuple[Method, Made]:
    """Who made it, and what: by the method asked for, or by the first of the preferred that can do the task."""
    *others, last = PREFERRED if method == "auto" else (method,)
    for name in others:
        way = registry.find("visualize", name)
        with contextlib.suppress(MissingDependency, NotApplicable):
            return way, made_of(task, way.run, batch_size)
    way = registry.find("visualize", last)
    return way, made_of(task, way.run, batch_size)
