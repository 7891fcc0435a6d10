"""What a store answers without a model: the vectors of its images, their files, labels and scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchloupe_core import registry
from torchloupe_core.blocks import state_of
from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput, StoreError, UnknownName
from torchloupe_core.features import FeatureSet
from torchloupe_core.handle import Handle
from torchloupe_core.identity import differences, of_model
from torchloupe_core.spec import Spec
from torchloupe_core.statistics import Features
from torchloupe_core.store import Damaged, Store

__all__ = ["Rows", "facts_of", "rows_of", "skipped", "stored_data", "stored_features"]

TABLE = "lancedb.table"


@dataclass(frozen=True)
class Rows:
    """M images: `indices [M]`, `labels [M]` (-1 unknown), `vectors [M, D]`, `scores [M, T]`; names of their files."""

    indices: Tensor
    labels: Tensor
    vectors: Tensor
    scores: Tensor
    names: Sequence[str] | None


def stored_features(path: str | PathLike[str], layer: object = None, handle: Handle | None = None) -> FeatureSet:
    """The features of a layer, read from a store; no image goes through the model.

    layer: what goes into the classifier unless given, or else the only one it holds. handle: a model to compare with
    the one it was made by, which prepares the images when they are read again. Raises `StoreError` if the store is not
    complete or of another model, `UnknownName` for a layer that it lacks.
    """
    store = Store.open(path)
    store.require_complete()
    if handle is not None:
        _require_model(store, handle)
    name = _layer(store, layer)
    found: Rows = registry.find("features", TABLE).run(store, name, lambda block: rows_of(store, name, block))
    order = found.indices.argsort()
    names = None if found.names is None else [found.names[row] for row in order.tolist()]
    classes = store.about["classes"]
    return FeatureSet(
        found.vectors[order].float(),
        found.indices[order],
        found.labels[order],
        None if names is None else tuple(_absolute(store, names)),
        None if classes is None else tuple(classes),
        name,
        skipped(store),
        None if names is None or handle is None else stored_data(store, handle.spec),
        {target: found.scores[order, place] for place, target in enumerate(store.about["targets"])},
    )


def stored_data(store: Store, spec: Spec) -> DataSet:
    """The files that were scanned, as a data set. Raises `StoreError` for a store of images that are no files."""
    names: list[str] = []
    labels: list[int] = []
    for facts in _facts(store):
        if facts["names"] is None:
            raise StoreError(f"{store.path} is of images that are no files and cannot be opened; give the data set")
        names += _absolute(store, facts["names"])
        labels += facts["stated"] or []
    classes = store.about["classes"]
    return DataSet(
        [Path(name) for name in names],
        spec,
        names=names,
        labels=labels or None,
        classes=None if classes is None else tuple(classes),
    )


def rows_of(store: Store, layer: str, block: int) -> Rows:
    """One block of the features of a layer. Raises `StoreError` if it is damaged."""
    try:
        arrays, rest = store.read(block)
    except Damaged as error:
        raise _damaged(store, error) from error
    indices, vectors = _computed(store, layer, arrays, rest)
    labels, scores = dict(rest["labels"]), torch.empty(len(indices), 0, dtype=vectors.dtype)
    if targets := store.about["targets"]:
        scores = _computed(store, ", ".join(targets), arrays, rest)[1]
    named = None if rest["names"] is None else dict(zip(rest["indices"], rest["names"], strict=True))
    names = None if named is None else [named[index] for index in indices.tolist()]
    return Rows(indices, torch.tensor([labels.get(index, -1) for index in indices.tolist()]), vectors, scores, names)


def skipped(store: Store) -> dict[int, str]:
    """The images that could not be read, with why."""
    return {index: why for facts in _facts(store) for index, why in facts["skipped"]}


def _computed(store: Store, what: str, arrays: Mapping[str, Tensor], rest: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    features = Features()
    place = next(place for place, (of, kind, _) in enumerate(store.statistics) if (of, kind) == (what, "Features"))
    features.load_state_dict(state_of(place, arrays, rest))
    return features.compute()


def _layer(store: Store, layer: object) -> str:
    targets = ", ".join(store.about["targets"])
    known = [what for what, kind, _ in store.statistics if kind == "Features" and what != targets]
    if layer is None and (len(known) == 1 or store.about["embedding"] in known):
        return str(store.about["embedding"]) if store.about["embedding"] in known else known[0]
    if layer is None:
        raise BadInput(f"{store.path} holds features of {len(known)} layers: {', '.join(known)}; name one with layer=")
    if str(layer) not in known:
        raise UnknownName.of("layer", layer, known, f"among the features in {store.path}")
    return str(layer)


def _require_model(store: Store, handle: Handle) -> None:
    given = of_model(handle)
    given["device"] = store.made_by["device"]  # another may ask than computed
    if found := differences(given, {name: store.made_by.get(name) for name in given}):
        lines = "".join(f"\n  {line}" for line in found)
        raise StoreError(f"{store.path} was made by another model:{lines}")


def facts_of(store: Store, block: int) -> dict[str, Any]:
    """What a block says besides its arrays. Raises `StoreError` if it is damaged."""
    try:
        return store.facts(block)
    except Damaged as error:
        raise _damaged(store, error) from error


def _facts(store: Store) -> Iterator[dict[str, Any]]:
    return (facts_of(store, block) for block in range(store.count))


def _damaged(store: Store, error: Damaged) -> StoreError:
    return StoreError(f"a block of {store.path} is damaged ({error}); the scan that made it does it again")


def _absolute(store: Store, names: Sequence[str]) -> list[str]:
    return [os.path.normpath(Path(store.about["folder"], name)) for name in names]
