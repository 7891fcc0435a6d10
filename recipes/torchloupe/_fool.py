"""The small change that makes a model see something else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.descent import Norm
from torchloupe_core.errors import BadInput
from torchloupe_core.fooled import Fooled
from torchloupe_core.images import require_pictures
from torchloupe_core.methods.fooling import LEVELS, Attack, aims_of, goal, lead, rounded, seen
from torchloupe_core.targets import TargetLike
from torchloupe_core.task import Made

__all__ = ["fool"]

EPS: dict[str, float] = {"linf": 8 / LEVELS, "l2": 1.0}
TOGETHER = 64


def fool(
    model: ModelLike,
    image: Any,
    target: TargetLike | Sequence[TargetLike] | None = None,
    *,
    norm: Norm = "linf",
    eps: float | None = None,
    method: str = "pgd",
    loss: str = "prob",
    eight_bit: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    interruptible: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Fooled:
    """The images changed by at most eps so that the model sees the target, or without one anything but what it sees.

    image: one or several, of any kind, as the model is shown them. target: a class, by name or number or as
    `logit:fish`, one for all or one for each image. norm: "linf", eps the most that a channel of a pixel may change,
    8/255 unless given, or "l2", eps the norm of the whole change, 1 unless given; pixels are in [0, 1]. method: "pgd",
    with `steps`, `step_size` and `restarts`, or "fgsm", one step. loss: "prob", the class's probability, whose
    direction is the cross-entropy's, or "margin", its logit against the largest other one (Carlini and Wagner 2017),
    which is taken for an image too where the model is so sure that its probability has no gradient.

    Images given and made are those a file of 8 bits holds, each change a whole number of levels and the whole within
    eps; eight_bit=False leaves them as they are computed. What the model sees is asked anew of these. Raises
    `BadInput` for a target that is the prediction already, and for an eps that no picture can show.
    """
    begun = time.perf_counter()
    handle = opened(model, device=device, dtype=dtype)
    way = registry.find("fool", method)
    way.check_options(options)
    radius = _radius(norm, eps, eight_bit)
    inputs = handle.inputs(image)
    require_pictures(inputs, handle.spec)
    given = handle.spec.pixels(inputs)
    given = ((given.double() * LEVELS).round() / LEVELS).to(given) if eight_bit else given
    forwards, together = handle.forwards, batch_size or TOGETHER
    with handle.borrow(), progress_bar("fool", "steps", progress) as report:
        before = seen(handle, given, together)
        aims = aims_of(handle, target, given, before)
        goals = [goal(handle, loss, aim, row) for aim, row in zip(aims, before, strict=True)]
        attack = Attack(handle, given, goals, norm, radius, seed, batch_size, interruptible, report)
        runs = _complete(way.run(attack, **options))
        n = len(runs[0].images)  # fewer if interrupted
        start, aims, before = given[:n].cpu(), aims[:n], before[:n]
        tried = [rounded(run.images, start, norm, radius) if eight_bit else run.images for run in runs]
        answers = [seen(handle, one.to(given), together) for one in tried]
    leads = torch.stack([lead(one, aims, before) for one in answers])  # [runs, n]
    best, rows = leads.argmax(0), torch.arange(n)
    return Fooled(
        method=way.name,
        backend=way.backend,
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(way.backend),
        options={**way.options, **options, "loss": loss, "eight_bit": eight_bit},
        images=torch.stack(tried)[best, rows].float(),
        given=start.float(),
        before=before.softmax(1),
        after=torch.stack(answers)[best, rows].softmax(1),
        goals=tuple(map(str, goals[:n])),
        aims=torch.tensor([-1 if aim is None else aim for aim in aims]),
        success=leads.amax(0) > 0,
        norm=norm,
        eps=radius,
        losses=torch.stack([run.losses for run in runs])[best, rows],
        classes=handle.classes,
        stopped="; ".join(dict.fromkeys(run.stopped for run in runs if run.stopped)),
        diagnostics={"start": best.tolist()},
    )


def _radius(norm: str, eps: float | None, eight_bit: bool) -> float:
    if norm not in EPS:
        raise BadInput(f'norm is "linf" or "l2"; got {norm!r}')
    radius = EPS[norm] if eps is None else float(eps)
    if not 0 < radius < float("inf"):
        raise BadInput(f"eps is above 0, in units of pixels from 0 to 1; got {eps}")
    if eight_bit and radius * LEVELS < 1 - 1e-6:
        raise BadInput(
            f"eps={radius:.3g} is less than one level of 8 bits, 1/255, so nothing may change; give more, "
            "or eight_bit=False"
        )
    return radius


def _complete(runs: list[Made]) -> list[Made]:
    """The first run, and those after it that came as far."""
    return [run for run in runs if run.losses.shape == runs[0].losses.shape]
