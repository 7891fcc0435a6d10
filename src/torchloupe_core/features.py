"""The data set as the model sees it: one vector for each image, from one pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet, class_names, open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.nearest import norms
from torchloupe_core.scan import scan
from torchloupe_core.statistics import Features

__all__ = ["FeatureSet", "collect"]

Report = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What one layer gives for M images of a data set, averaged over positions.

    vectors: `[M, D]` float32, finite. indices: `[M]`, which image of the data set each row is, rising as a pass gives
    them. labels: `[M]`, -1 where unknown. names: the file of each row, None where images are no files. classes: a name
    for each label. layer: which layer. skipped: the images that could not be read, by index, with why. data: where the
    images are read again, None if they cannot be. scores: values of targets for each row, `[M]`, by their text.
    """

    vectors: Tensor
    indices: Tensor
    labels: Tensor
    names: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    layer: str = ""
    skipped: Mapping[int, str] = field(default_factory=dict)
    data: DataSet | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not self.vectors.numel():
            raise BadInput(f"features are [M, D], a vector for each image; got {list(self.vectors.shape)}")
        for name in ("indices", "labels", "names"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.vectors):
                raise BadInput(f"{len(self.vectors)} vectors come with {len(value)} {name}")
        if not bool(self.vectors.isfinite().all()):
            row = int((~self.vectors.isfinite().all(1)).nonzero()[0, 0])
            raise BadInput(f"the features of {self.name(row)} hold NaN or infinity")

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def lengths(self) -> Tensor:
        """The length of each vector, `[M]` float64; found once, for searches."""
        return norms(self.vectors)

    @property
    def labelled(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels >= 0).any())

    def name(self, row: int) -> str:
        """What to call the image of a row."""
        return self.names[row] if self.names is not None else f"image {int(self.indices[row])}"

    @property
    def failures(self) -> dict[str, str]:
        """What could not be read, by name, with why."""
        called = self.data.name if self.data is not None else "image {}".format
        return {called(index): why for index, why in self.skipped.items()}

    def some(self, rows: Sequence[int]) -> FeatureSet:
        """The images of some rows, in their order."""
        chosen = list(rows)
        names = None if self.names is None else tuple(self.names[row] for row in chosen)
        return replace(
            self,
            vectors=self.vectors[chosen],
            indices=self.indices[chosen],
            labels=self.labels[chosen],
            names=names,
            scores={target: values[chosen] for target, values in self.scores.items()},
        )


def collect(
    handle: Handle,
    data: Any,
    layer: object = None,
    *,
    store: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    resume: bool = True,
    batch_size: int | None = None,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    skip_failures: bool = True,
    progress: Report = lambda done, total: None,
) -> FeatureSet:
    """The features of a data set of any kind, from one forward pass a batch that ends at the layer.

    layer: what goes into the classifier unless given; `fc.in` is what goes into `fc`. store: where they are kept; what
    is there already needs no forward pass. The rest as in `scan`.
    """
    opened = open_data(data, handle.spec)
    name = str(layer) if layer is not None else default_layer(handle, opened)
    features = Features()
    found = scan(
        handle,
        opened,
        {name: [features]},
        store=store,
        engine=engine,
        resume=resume,
        batch_size=batch_size,
        workers=workers,
        autocast=autocast,
        skip_failures=skip_failures,
        progress=progress,
    )
    if store is not None:
        from torchloupe_core.stored import stored_features  # which builds on this file

        return replace(stored_features(store, name, handle), data=opened)
    indices, vectors = features.compute()
    rows: list[int] = indices.tolist()
    return FeatureSet(
        vectors.float(),
        indices,
        torch.tensor([found.labels.get(row, -1) for row in rows]),
        None if opened.names is None else tuple(opened.names[row] for row in rows),
        class_names(opened),
        name,
        found.skipped,
        opened,
    )


def default_layer(handle: Handle, data: DataSet) -> str:
    """What goes into the classifier. A model whose input size is not known is asked at that of the first image."""
    return handle.embedding_at(first_shape(handle, data))


def first_shape(handle: Handle, data: DataSet) -> Shape:
    """The model's input size, or where that is not known the size of the first image. Raises `BadInput`."""
    if handle.spec.input_size is not None:
        return handle.spec.input_size
    first = next((one.inputs for one in data.samples() if one.inputs is not None), None)
    if first is None:
        raise BadInput("no image of the data set can be read")
    channels, height, width = first.shape
    return channels, height, width
