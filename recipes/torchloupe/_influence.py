"""The training images a prediction rests on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import nn

from torchloupe._models import ModelLike, at_checkpoint, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.dataset import DataSet, open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.influence import Influence
from torchloupe_core.labels import Given
from torchloupe_core.losses import LossLike, as_loss
from torchloupe_core.methods.influence.head import linear_head
from torchloupe_core.methods.influence.lasting import Lasting, made_by, require_kept
from torchloupe_core.methods.influence.network import Curvature
from torchloupe_core.methods.influence.pieces import chosen_parameters
from torchloupe_core.methods.influence.study import Asked, Decay, Kept, Study, head_study, network_study, shape_of
from torchloupe_core.targets import Target, TargetLike, as_target

__all__ = ["influence", "studied", "targets_of", "tests_of"]

LOSS = "positive: the image supported the prediction; removing it raises the test loss"
Head = Literal["alone", "through the model"] | None
TARGET = "positive: the image supported the target; removing it lowers the target"


def influence(
    model: ModelLike,
    train: Any,
    test: Any,
    *,
    method: str = "cg",
    layers: str | Sequence[object] | None = None,
    curvature: Curvature = "gauss_newton",
    loss: LossLike = None,
    target: TargetLike | Sequence[TargetLike] | None = None,
    labels: Given = None,
    test_labels: Given = None,
    weight_decay: Decay = None,
    damping: float | None = None,
    check: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip_failures: bool = True,
    memory: float = 2.0,
    store: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    resume: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> Influence:
    """How much each training image supports the model's answer for each test image: `scores [N_test, N_train]`.

    A positive score says that the image supported the prediction: removing it raises the loss of the test image, or
    lowers the `target` asked about. Scores of methods with curvature are that change itself, to first order.

    layers: None for the head alone, the last linear layer, in closed form and one pass over each data set; names of
    layers, each with all in it; or "all". curvature: beyond the head, "gauss_newton", which has no negative
    eigenvalues, or the "hessian" itself. memory: GiB that images and gradients may take there.

    loss: "cross_entropy", "squared" (half the squared distance to the label's unit vector, or to the label where there
    is one output), or a function (logits `[N, K]`, labels `[N]`) -> `[N]`. Without a target the question is the test's
    loss for its label, or for the predicted class where it has none. labels, test_labels: in place of the data sets'
    own.

    weight_decay: of the training, for the *mean* loss: mean loss + weight_decay / 2 x |parameters|^2, as
    `torch.optim.SGD` takes it, or a table by parameter name. damping: added to the curvature's eigenvalues, in the same
    units; without weight decay ten times their mean unless given. Where the objective is summed over n images divide
    its factors by n. check: so many training images are really removed, the head fitted again, and the correlation
    reported (0: none). The model answers in eval mode.

    store: a folder that keeps what parts of the training images came to, so that a run that was killed goes on and the
    ranks of one under `torchrun` share the work; the head keeps its pass there, other layers their gradients. A store
    of anything else is refused with what differs, among it a training set in another order. engine="ray" spreads the
    parts; resume=False refuses a store that holds any. What does not fit in memory is refused before it starts.

    Raises `BadInput` where training labels are missing or no class of the model, `NotApplicable` where the Hessian is
    indefinite or singular, or the model ends in no linear layer.
    """
    entry = registry.find("influence", method)
    entry.check_options(options)
    if curvature not in ("gauss_newton", "hessian"):
        raise BadInput(f'curvature is "gauss_newton" or "hessian"; got {curvature!r}')
    if not memory > 0:
        raise BadInput(f"memory is a number of GiB above 0; got {memory}")
    if check < 0:
        raise BadInput(f"check is at least 0; got {check}")
    handle = opened(model, device=device, dtype=dtype)
    begun, forwards = time.perf_counter(), handle.forwards
    names = chosen_parameters(handle, "all" if layers is None else layers)
    train_data, test_data = open_data(train, handle.spec), tests_of(test, handle)
    asked = Asked(as_loss(loss), targets_of(target), labels, test_labels, weight_decay, damping, seed)
    head: Head = None if layers is not None else "alone" if entry.backend == "native" else "through the model"
    how: dict[str, Any] = {"memory": memory, "curvature": curvature, "batch_size": batch_size}
    how |= {"workers": workers, "skip_failures": skip_failures}
    lasting = None
    if store is not None or engine is not None:
        lasting = _kept(entry, head, store, engine, resume)
        question: dict[str, Any] = {"method": entry.name, "options": {**options, **_named(options)}, **asked.facts}
        question |= {"parameters": names, "curvature": curvature, "memory": memory}
        checkpoints = [one() for one in opened_checkpoints(handle, options).get("checkpoints", ())]
        lasting = replace(lasting, made_by=made_by(handle, train_data, test_data, question, checkpoints))
    with progress_bar("influence", "images", progress) as report, handle.borrow():
        study = studied(handle, names, train_data, test_data, asked, report, head=head, lasting=lasting, **how)
        answer = entry.run(study.problem, **{**options, **opened_checkpoints(handle, options)})
        diagnostics = study.judged(answer, check)
        norms = study.problem.gradient_norms.cpu()  # which may take a pass
    alone = len(answer.scores) != len(study.test_indices)  # each training image by itself
    best = study.logits.softmax(1).max(1)
    return Influence(
        method=entry.name,
        backend=entry.backend,
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(entry.backend),
        options={**entry.options, **options, **_named(options)},
        scores=answer.scores.to("cpu", torch.float64 if handle.dtype == torch.float64 else torch.float32),
        sign=answer.sign or (LOSS if target is None or alone else TARGET),
        units=answer.units,
        about=("its own loss",) if alone else study.about,
        train_indices=study.train_indices,
        test_indices=study.test_indices[: 0 if alone else None],
        train_labels=study.train_labels,
        test_labels=study.test_labels[: 0 if alone else None],
        predictions=best.indices[: 0 if alone else None],
        confidences=best.values.float()[: 0 if alone else None],
        layers=study.layers,
        parameters=study.problem.size,
        gradient_norms=norms,
        diagnostics=diagnostics,
        classes=handle.classes,
        skipped=study.skipped,
        names={} if train_data.names is None else {str(n): name for n, name in enumerate(train_data.names)},
        train=train_data,
        test=test_data,
        question=None if answer.vectors is None else Kept(study.problem, answer.vectors, train_data, handle),
    )


def studied(
    handle: Handle,
    names: Sequence[str],
    train: DataSet,
    test: DataSet,
    asked: Asked,
    report: Callable[[int, int], None],
    *,
    head: Head,
    memory: float = 2.0,
    curvature: Curvature = "gauss_newton",
    batch_size: int | None = None,
    lasting: Lasting | None = None,
    **reading: Any,
) -> Study:
    """The data read and the question set up, with the model borrowed. head: how its parameters alone are asked about;
    other libraries go through the model. None: about all those named.
    """
    if head == "alone":
        kept = {} if lasting is None else lasting.of_a_scan("train")
        return head_study(handle, names, train, test, asked, report, batch_size=batch_size, kept=kept, **reading)
    if head is not None:
        own = linear_head(handle, shape_of(handle, test)).name
        names = tuple(name for name in names if name.startswith(f"{own}."))
    reading |= {"room": memory * 2**30, "curvature": curvature}
    return network_study(handle, names, train, test, asked, report, lasting=lasting, **reading)


def _kept(
    entry: registry.Method, head: Head, store: str | os.PathLike[str] | None, engine: str | None, resume: bool
) -> Lasting:
    """Where passes are kept, and who makes them. Raises `BadInput` where nothing would be kept."""
    if store is None:
        raise BadInput("engine= spreads what store= keeps; name a folder with store=")
    require_kept(entry.name, head, Path(store))
    spread = None if engine is None else registry.find("engine", engine).run
    return Lasting(Path(store), {}, resume, spread=spread, engine=engine)


def opened_checkpoints(handle: Handle, options: Mapping[str, Any]) -> dict[str, Any]:
    """The option of that name, as functions that open the model with other weights."""
    given = options.get("checkpoints")
    return {} if given is None else {"checkpoints": [partial(at_checkpoint, handle, one) for one in given]}


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Checkpoints by what they are called."""
    kinds = {Mapping: "state dict", Handle: "Handle"}
    given = options.get("checkpoints")
    if given is None:
        return {}
    names = [next((name for kind, name in kinds.items() if isinstance(one, kind)), None) for one in given]
    return {
        "checkpoints": [
            name or (type(one).__name__ if isinstance(one, nn.Module) else str(one))
            for name, one in zip(names, given, strict=True)
        ]
    }


def tests_of(test: Any, handle: Handle) -> DataSet:
    """A data set of the test images, of which there may be one."""
    alone = isinstance(test, Image) or (getattr(test, "ndim", 0) == 3 and hasattr(test, "shape"))
    return open_data([test] if alone else test, handle.spec)


def targets_of(target: TargetLike | Sequence[TargetLike] | None) -> list[Target] | None:
    """One target for all tests, or one for each; None for the loss."""
    if target is None:
        return None
    if isinstance(target, str) or not isinstance(target, Sequence):
        return [as_target(target)]
    return [as_target(one) for one in target]
