"""Labels of a data set that may be wrong, most suspicious first."""

from __future__ import annotations

import time
from typing import Any

import torch

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.dataset import DataSet, open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.labels import Given
from torchloupe_core.losses import as_loss
from torchloupe_core.methods.influence.head import HeadProblem
from torchloupe_core.methods.influence.pieces import chosen_parameters
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT
from torchloupe_core.methods.influence.study import Asked, Decay, Study, head_study
from torchloupe_core.methods.influence.suspicion import suspicions
from torchloupe_core.suspects import Suspects

__all__ = ["clean", "head_of"]


def clean(
    model: ModelLike,
    dataset: Any,
    *,
    labels: Given = None,
    k: int = 10,
    weight_decay: Decay = None,
    damping: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: bool | None = None,
) -> Suspects:
    """The labels of a data set by how suspicious each is to a model that was trained on them, from one pass.

    Four scores: the loss, the margin of the best other class, the image's influence on its own loss through the head,
    and how many of its `k` nearest images, by what goes into the head, have another label. `.top(20)` goes by all of
    them together, `.top(20, by="loss")` by one; `.html(path)` writes a page to look through them. labels: in place of
    the data set's own. weight_decay, damping: as in `influence`.

    Raises `BadInput` where labels are missing or no classes of the model, `NotApplicable` for a model that ends in no
    linear layer.
    """
    if k < 1:
        raise BadInput(f"k is at least 1; got {k}")
    handle = opened(model, device=device, dtype=dtype)
    begun, forwards = time.perf_counter(), handle.forwards
    data = open_data(dataset, handle.spec)
    asked = Asked(as_loss(None), None, labels, None, weight_decay, damping, seed)
    reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "skip_failures": skip_failures}
    with progress_bar("clean", " images", progress) as report:
        study, problem = head_of(handle, data, asked, report, **reading)
    if problem.n < 2:
        raise BadInput("one image has no neighbours; give a data set of several")
    scores = suspicions(problem, k)
    best = problem.logits.softmax(1).max(1)
    curved = problem.size <= LARGEST_EXPLICIT
    return Suspects(
        method="clean",
        backend="native",
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions("native"),
        options={"k": k, "weight_decay": weight_decay, "damping": damping},
        scores=torch.stack(list(scores.values())).float(),
        indices=study.train_indices,
        labels=study.train_labels,
        predictions=best.indices.cpu(),
        confidences=best.values.float().cpu(),
        k=min(k, problem.n - 1),
        score_names=tuple(scores),
        classes=handle.classes,
        names=None if data.names is None else tuple(data.names[index] for index in study.train_indices.tolist()),
        skipped=study.skipped,
        diagnostics={"damping": problem.damping, "self_influence_with_curvature": curved},
        data=data,
    )


def head_of(handle: Handle, data: DataSet, asked: Asked, report: Any, **reading: Any) -> tuple[Study, HeadProblem]:
    """What the head reads of a labelled data set; its first image stands for a test."""
    first = next((sample.inputs for sample in data.samples() if sample.inputs is not None), None)
    if first is None:
        raise BadInput("none of the images could be read")
    names = chosen_parameters(handle, "all")
    with handle.borrow():
        study = head_study(handle, names, data, open_data(first[None], handle.spec), asked, report, **reading)
    if not isinstance(study.problem, HeadProblem):
        raise TypeError(type(study.problem).__name__)
    return study, study.problem
