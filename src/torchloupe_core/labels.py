"""The labels of a data set as a loss needs them: one for each image, among the model's classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.scan import Scanned

__all__ = ["labels_of", "require_classes"]

Given = Sequence[int | float] | Tensor | None


def labels_of(
    data: DataSet, scanned: Scanned, indices: Tensor, what: str, given: Given = None, classes: Any = None
) -> Tensor | None:
    """`[M]`: the labels of the images at `indices`, None if the data set has none at all.

    given: labels for all images of the data set, which win. classes: the model's, by which a folder's class subfolders
    are found. Raises `BadInput` where some images have labels and others none, or a subfolder is no class.
    """
    if given is not None:
        return _given(data, indices, what, given)
    if not scanned.labels:
        return None
    lacking = [index for index in indices.tolist() if index not in scanned.labels]
    if lacking:
        raise BadInput(
            f"{len(lacking)} of {len(indices)} {what} images have no label, the first: {data.name(lacking[0])}"
        )
    found = torch.tensor([scanned.labels[index] for index in indices.tolist()])
    if data.classes is None or classes is None:
        return found
    return torch.tensor([_class_of(name, classes, what) for name in data.classes])[found]


def require_classes(labels: Tensor, indices: Tensor, data: DataSet, outputs: int, what: str) -> Tensor:
    """The labels as whole numbers from 0 to outputs - 1. Raises `BadInput` with the first that is none."""
    whole = labels.long()
    wrong = (whole != labels) | (whole < 0) | (whole >= outputs)
    if wrong.any():
        place = int(wrong.nonzero()[0, 0])
        raise BadInput(
            f"the {what} label of {data.name(int(indices[place]))} is {labels[place].item()}; the model has {outputs} "
            f"outputs, 0 to {outputs - 1}"
        )
    return whole


def _given(data: DataSet, indices: Tensor, what: str, given: Sequence[int | float] | Tensor) -> Tensor:
    labels = torch.as_tensor(given).detach().cpu()
    if labels.ndim != 1 or (data.length is not None and len(labels) != data.length):
        raise BadInput(f"labels of {data.length} {what} images are one number each; got shape {list(labels.shape)}")
    return labels[indices]


def _class_of(folder: str, classes: Sequence[str], what: str) -> int:
    if folder in classes:
        return classes.index(folder)
    if folder.isdecimal() and int(folder) < len(classes):
        return int(folder)
    names = ", ".join(map(repr, classes[:5])) + (" ..." if len(classes) > 5 else "")
    raise BadInput(f"the {what} folder {folder!r} is no class of the model, as {names}; rename it, or give labels=")
