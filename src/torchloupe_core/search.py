"""Searching a data set for the images most like others, in features or in pixels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet, Sample, batches, class_names
from torchloupe_core.errors import BadInput
from torchloupe_core.features import FeatureSet
from torchloupe_core.nearest import Metric, Nearest, apart
from torchloupe_core.spec import Spec

__all__ = ["Approximate", "Hits", "in_features", "in_pixels", "of_pixels"]

Report = Callable[[int, int], None]
Approximate = Callable[[Tensor, Tensor, int, Metric], Tensor]  # queries, vectors, k, metric: rows [Q, k], -1 for none
AT_ONCE = 32
HELD = 2**25  # values of pixels held at once, 128 MB
MEASURED = 100  # queries that the recall of an approximate search is measured on


@dataclass(frozen=True)
class Hits:
    """What a search found, `[Q, k]`: `indices` in the data set, `distances`, `labels`; and among how many images.

    names: the files of the neighbours, query after query; classes: the names of the labels. skipped: what could not be
    read. diagnostics: of an approximate search.
    """

    indices: Tensor
    distances: Tensor
    labels: Tensor
    names: tuple[str, ...] | None
    classes: tuple[str, ...] | None
    images: int
    skipped: Mapping[str, str]
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


def in_features(
    queries: FeatureSet, data: FeatureSet, k: int, metric: Metric, leave_out: Tensor, approximate: Approximate | None
) -> Hits:
    """The nearest images by their features. leave_out: for each query the row of `data` that does not count, or -1."""
    if queries.vectors.shape[1] != data.vectors.shape[1]:
        own, other = queries.vectors.shape[1], data.vectors.shape[1]
        raise BadInput(
            f"queries have {own} features and the data set {other}; they come from different layers or models"
        )
    diagnostics: dict[str, Any] = {}
    if approximate is None:
        rows, distances = _exact(queries, data, k, metric, leave_out)
    else:
        rows, distances, diagnostics = _approximate(approximate, queries, data, k, metric, leave_out)
    every = rows.flatten().tolist()
    names = None if data.names is None else tuple(data.names[row] for row in every)
    labels, failures = data.labels[rows], data.failures | queries.failures
    return Hits(data.indices[rows], distances, labels, names, data.classes, len(data), failures, diagnostics)


def _exact(queries: FeatureSet, data: FeatureSet, k: int, metric: Metric, leave_out: Tensor) -> tuple[Tensor, Tensor]:
    search = Nearest(queries.vectors, k, metric, leave_out)
    search.update(data.vectors, torch.arange(len(data)), data.lengths)
    return search.compute()


def _approximate(
    way: Approximate, queries: FeatureSet, data: FeatureSet, k: int, metric: Metric, leave_out: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rows from elsewhere, their distances anew, and which share of the true ones they are, for some queries."""
    excluding = bool((leave_out >= 0).any())
    k = min(k, len(data) - excluding)
    rows = way(queries.vectors, data.vectors, k + excluding, metric)
    lost = ((rows < 0).any(1)).nonzero()[:, 0].tolist()  # where its graph falls into parts
    queried = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    distances = apart(queries.vectors, data.vectors, queried, rows.flatten(), metric).view(rows.shape)
    distances = distances.masked_fill(rows == leave_out[:, None], torch.inf)
    order = torch.from_numpy(np.lexsort((rows.numpy(), distances.numpy()))[:, :k])
    rows, distances = rows.gather(1, order), distances.gather(1, order)
    if lost:
        rows[lost], distances[lost] = _exact(queries.some(lost), data, k, metric, leave_out[lost])
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MEASURED].tolist()
    truth, _ = _exact(queries.some(some), data, k, metric, leave_out[some])
    recall = (rows[some][:, :, None] == truth[:, None]).any(2).double().mean().item()
    return rows, distances, {"recall": recall, "recall_queries": len(some)}


def of_pixels(data: DataSet, indices: Sequence[int] | None, skip_failures: bool) -> FeatureSet:
    """The pixels of some images of a data set as vectors, of all unless said which."""
    skipped: dict[int, str] = {}
    parts = list(_pixels(data, indices, skip_failures, skipped, None))
    if not parts:
        raise BadInput(_nothing(skipped))
    found = _joined(parts)
    names = None if data.names is None else tuple(data.names[row] for row in found.indices.tolist())
    return FeatureSet(found.vectors, found.indices, found.labels, names, class_names(data), found.size, skipped, data)


def in_pixels(
    queries: FeatureSet,
    data: DataSet,
    indices: Sequence[int] | None,
    k: int,
    metric: Metric,
    leave_out: Tensor,
    skip_failures: bool,
    report: Report,
) -> Hits:
    """The nearest images by their pixels, read once, a few at a time. leave_out: the index that does not count."""
    search = Nearest(queries.vectors, k, metric, leave_out)
    skipped: dict[int, str] = {}
    labels: dict[int, int] = {}
    total, seen = len(indices) if indices is not None else data.length, 0
    for part in _gathered(_pixels(data, indices, skip_failures, skipped, queries.layer)):
        search.update(part.vectors, part.indices)
        labels.update(zip(part.indices.tolist(), part.labels.tolist(), strict=True))
        seen += len(part.indices)
        report(seen + len(skipped), total or seen + len(skipped))
    if not seen:
        raise BadInput(_nothing(skipped))
    found, distances = search.compute()
    rows: list[int] = found.flatten().tolist()
    names = None if data.names is None else tuple(data.names[row] for row in rows)
    shown = torch.tensor([labels[row] for row in rows], dtype=torch.long).view(found.shape)
    failures = {data.name(index): why for index, why in skipped.items()} | queries.failures
    return Hits(found, distances, shown, names, class_names(data), seen, failures)


@dataclass(frozen=True)
class _Pixels:
    """Some images: their indices, labels and pixels `[B, D]`, and the size they all have, in words."""

    indices: Tensor
    labels: Tensor
    vectors: Tensor
    size: str


def _pixels(
    data: DataSet, indices: Sequence[int] | None, skip_failures: bool, skipped: dict[int, str], size: str | None
) -> Iterator[_Pixels]:
    """The pixels of a data set a few images at a time. Raises `BadInput` for one of another size than the others."""
    wanted, chosen = copy.copy(data), None if indices is None else set(indices)
    if chosen is not None and not data.streams:
        wanted.order = sorted(chosen)
    with contextlib.closing(batches(wanted, AT_ONCE)) as parts:
        for part in parts:
            mine = [one for one in part if chosen is None or one.index in chosen]
            good = [(one, inputs) for one in mine if (inputs := _inputs(one, data, skip_failures, skipped)) is not None]
            for one, inputs in good:
                own = "pixels " + "x".join(map(str, inputs.shape))
                size = size or own
                if own != size:
                    raise BadInput(
                        f"images are compared in pixels at one size; {data.name(one.index)} is {own}, not {size}"
                    )
            if good and size:
                indices_seen = torch.tensor([one.index for one, _ in good])
                labels = torch.tensor([-1 if one.label is None else one.label for one, _ in good])
                yield _Pixels(indices_seen, labels, torch.stack([_values(one, data.spec) for _, one in good]), size)


def _gathered(parts: Iterator[_Pixels]) -> Iterator[_Pixels]:
    """Parts put together as far as memory is spared: the more at once, the fewer distances are settled."""
    held: list[_Pixels] = []
    for part in parts:
        held.append(part)
        if sum(one.vectors.numel() for one in held) >= HELD:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(parts: Sequence[_Pixels]) -> _Pixels:
    columns = zip(*((part.indices, part.labels, part.vectors) for part in parts), strict=True)
    indices, labels, vectors = (torch.cat(column) for column in columns)
    return _Pixels(indices, labels, vectors, parts[0].size)


def _inputs(sample: Sample, data: DataSet, skip_failures: bool, skipped: dict[int, str]) -> Tensor | None:
    if sample.error is not None:
        if not skip_failures:
            name = data.name(sample.index)
            raise BadInput(sample.error if name in sample.error else f"{name}: {sample.error}")
        skipped[sample.index] = sample.error
    return sample.inputs


def _values(inputs: Tensor, spec: Spec) -> Tensor:
    """The pixels as they were before they were normalised, where that is known."""
    values = inputs.float()
    if spec.mean is not None and spec.std is not None:
        values = values * torch.tensor(spec.std)[:, None, None] + torch.tensor(spec.mean)[:, None, None]
    return values.flatten()


def _nothing(skipped: dict[int, str]) -> str:
    first = next(iter(skipped.values()), None)
    return "the data set is empty" if first is None else f"none of the images could be read; the first: {first}"
