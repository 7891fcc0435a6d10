"""How far to trust influence: held against trainings without the images it speaks of."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch

from torchloupe._influence import influence, studied, targets_of, tests_of
from torchloupe._models import ModelLike, opened
from torchloupe._validation_run import Counted, Run, Trains, refits_of
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.labels import Given
from torchloupe_core.losses import LossLike, as_loss
from torchloupe_core.methods.influence import validating
from torchloupe_core.methods.influence.pieces import chosen_parameters
from torchloupe_core.methods.influence.study import Asked, Decay
from torchloupe_core.targets import TargetLike
from torchloupe_core.validation import Validation

__all__ = ["validate_influence"]

Check = Literal["leave_one_out", "leave_k_out", "lds", "mislabelled", "removal"]
CHECKS: tuple[Check, ...] = get_args(Check)
Methods = str | Sequence[str] | Mapping[str, Mapping[str, Any]]

SHARES = (0.05, 0.1, 0.2, 0.3)
HEAD = "refits of the head"


def validate_influence(
    model: ModelLike,
    train: Any,
    test: Any,
    *,
    method: Methods = "cg",
    fit: Trains | None = None,
    checks: Check | Sequence[Check] = CHECKS,
    images: int = 24,
    groups: int = 24,
    k: int | None = None,
    subsets: int = 32,
    share: float = 0.5,
    seeds: int = 1,
    wrong: float = 0.1,
    shares: Sequence[float] = SHARES,
    loss: LossLike = None,
    target: TargetLike | Sequence[TargetLike] | None = None,
    labels: Given = None,
    test_labels: Given = None,
    weight_decay: Decay = None,
    damping: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: bool | None = None,
) -> Validation:
    """What methods of `influence` foretell, held against what trainings without some training images come to.

    method: a name, several, or a table of what to call each in the answer and what to ask `influence` with, as
    `{"whole": {"method": "ekfac", "layers": "all"}}`. fit: a function (indices `[m]`, labels `[m]`, seed) that trains
    on these images of the training set and gives a module, a state dict or a `Handle`. Without it the head alone is
    asked about and fitted again, exactly and in no time.

    checks: "leave_one_out": `images` removed one by one, half of them those of the largest scores. "leave_k_out":
    `groups` of `k` removed, by default a twentieth of the training set: most helpful, most harmful, drawn. "lds":
    `subsets` of a `share` of the images drawn, `seeds` trainings for each. "mislabelled": a share `wrong` of the labels
    changed, the model trained with them, and the images ranked by what they do against the tests; `test` then is best
    clean. "removal": the share of the images that is most helpful to all tests removed, for each of `shares`.

    The other options are those of `influence`. Raises `NotApplicable` where the head has no minimum to fit, `BadInput`
    for a method without scores for test images.
    """
    asked_of = _methods(method)
    made = [checks] if isinstance(checks, str) else list(checks)
    sizes: dict[str, Any] = {"images": images, "groups": groups, "k": k, "subsets": subsets, "seeds": seeds}
    sizes |= {"share": share, "wrong": wrong, "shares": tuple(shares)}
    _check(made, **sizes)
    handle = opened(model, device=device, dtype=dtype)
    begun, forwards = time.perf_counter(), handle.forwards
    asked = Asked(as_loss(loss), targets_of(target), labels, test_labels, weight_decay, damping, seed)
    plain: dict[str, Any] = {"loss": loss, "target": target, "labels": labels, "test_labels": test_labels}
    plain |= {"weight_decay": weight_decay, "damping": damping, "seed": seed, "workers": workers}
    plain |= {"skip_failures": skip_failures, "progress": progress, "check": 0}
    if fit is None and (other := next((name for name, one in asked_of.items() if one.get("layers")), None)):
        raise BadInput(f"without fit= the head alone is fitted again, and {other!r} asks about layers; give fit=")
    train_data, test_data = open_data(train, handle.spec), tests_of(test, handle)
    names = chosen_parameters(handle, "all")
    with progress_bar("training", "models", progress) as report, handle.borrow():
        study = studied(
            handle,
            names,
            train_data,
            test_data,
            asked,
            lambda done, total: None,
            head="alone" if fit is None else None,
            workers=workers,
            skip_failures=skip_failures,
        )
        refits = Counted(refits_of(study, fit, handle, seed, report))
        found = {
            name: influence(handle, train_data, test_data, **plain, **options) for name, options in asked_of.items()
        }
        run = Run(study, refits, found, seed, seeds)
        facts: dict[str, Any] = {}
        if "leave_one_out" in made:
            run.hold("single", "leave_one_out", validating.single_images(run.scores, min(images, run.n), seed))
        if "leave_k_out" in made:
            size = k or max(1, run.n // 20)
            run.hold("group", "leave_k_out", validating.strong_groups(run.scores, groups, size, seed))
        if "lds" in made:
            run.hold("subset", "lds", validating.halves(run.n, subsets, share, seed))
        if "removal" in made:
            run.remove(shares)
        if "mislabelled" in made:
            again = partial(influence, train=train_data, test=test_data, **plain)
            facts = run.mislabel(asked_of, again, train_data.length or 0, wrong)
    own = [f"{name}: {warning}" for name, one in found.items() for warning in one.warnings]
    backends = sorted({one.backend for one in found.values()})
    return Validation(
        method=", ".join(found),
        backend=", ".join(backends),
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions={name: version for one in backends for name, version in versions(one).items()},
        options={"checks": made, **sizes, "weight_decay": weight_decay, "damping": damping},
        names=tuple(found),
        rows=run.rows,
        refits=HEAD if fit is None else "trainings anew",
        trainings=refits.count,
        about="loss" if target is None else "minus the target",
        question=run.before.mean().item(),
        train_indices=study.train_indices,
        shares=tuple(shares) if "removal" in made else (),
        diagnostics={"warnings": own},
        **run.fields,
        **facts,
    )


def _methods(method: Methods) -> dict[str, dict[str, Any]]:
    """What to call each method, and what to ask with."""
    if isinstance(method, str):
        method = [method]
    if isinstance(method, Mapping):
        found = {name: {"method": name, **options} for name, options in method.items()}
    else:
        found = {name: {"method": name} for name in method}
    if not found:
        raise BadInput("method names no method of influence")
    if alone := [name for name, options in found.items() if options["method"] == "self"]:
        raise BadInput(
            f"{alone[0]!r} has no scores for test images; self-influence is among what wrong labels are looked for by"
        )
    return found


def _check(made: Sequence[str], **numbers: Any) -> None:
    unknown = [one for one in made if one not in CHECKS]
    if unknown or not made:
        raise BadInput(f"checks are among {', '.join(CHECKS)}; got {', '.join(unknown) or 'none'}")
    for name in ("images", "groups", "k", "subsets", "seeds"):
        least = 1 if name in ("k", "seeds") else 3
        if numbers[name] is not None and numbers[name] < least:
            raise BadInput(f"{name} is at least {least}; got {numbers[name]}")
    for name in ("share", "wrong", "shares"):
        values = [numbers[name]] if not isinstance(numbers[name], Sequence) else list(numbers[name])
        if not values or not all(0 < one < 1 for one in values):
            raise BadInput(f"{name} is a share of the training images, between 0 and 1; got {numbers[name]}")
