"""Images made to move a target."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.making import Size, asked, commissioned, made_of, opinions, pictures
from torchloupe_core.methods.optimize import Made, Read, Task
from torchloupe_core.parametrizations import ParametrizationLike
from torchloupe_core.registry import Method
from torchloupe_core.regularizers import RegularizersLike
from torchloupe_core.results import texts
from torchloupe_core.targets import TargetLike
from torchloupe_core.transforms import TransformsLike
from torchloupe_core.visualization import Visualization

__all__ = ["visualize"]

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
    interruptible: bool = False,
    progress: bool | None = None,
) -> Visualization:
    """n images optimised to move each target as far as it goes (Olah et al. 2017, Feature Visualization)."""
    handle = opened(model, device=device, dtype=dtype, memory_format=memory_format)
    begun, forwards = time.perf_counter(), handle.forwards
    wanted = asked(target, n)
    with handle.borrow(), progress_bar("visualize", "steps", progress) as report:
        task = commissioned(
            handle,
            wanted,
            n=n,
            steps=steps,
            size=size,
            init=init,
            parametrization=parametrization,
            transforms=transforms,
            regularizers=regularizers,
            diversity=diversity,
            alignment=alignment,
            read=read,
            lr=lr,
            seed=seed,
            snapshots=snapshots,
            precision=precision,
            interruptible=interruptible,
        )
        way, made = _made(task, method, batch_size, n if diversity else 1)
        thoughts = opinions(task, made)
    return Visualization(
        method="visualize",
        backend=way.backend,
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(way.backend),
        options={},
        images=pictures(made.images),
        target=texts(wanted[: len(made.images)]),
        scores=made.scores,
        losses=made.losses,
        alpha=made.alpha,
        snapshots=None,
        stopped=made.stopped,
        diagnostics={"redirected": list(made.redirected), **thoughts},
    )


def _made(task: Task, method: str, batch_size: int | None, group: int) -> tuple[Method, Made]:
    """Who made it, and what: by the method asked for, or by the first of the preferred that can do the task."""
    names = PREFERRED if method == "auto" else (method,)
    for name in names:
        way = registry.find("visualize", name)
        try:
            return way, made_of(task, way.run, batch_size, group)
        except (MissingDependency, NotApplicable):
            if name == names[-1]:
                raise
    raise BadInput("no method was given")
