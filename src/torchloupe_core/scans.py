"""A data set that was scanned into a store, and what it says by itself."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from torchloupe_core.blocks import merged
from torchloupe_core.errors import StoreError, UnknownName
from torchloupe_core.features import FeatureSet
from torchloupe_core.statistics import Extremes, Moments, Top
from torchloupe_core.store import Store
from torchloupe_core.stored import facts_of, skipped, stored_features

__all__ = ["Scan"]


@dataclass(frozen=True)
class Scan:
    """A complete scan in a folder. seconds, forwards: what it took this time, images through the model."""

    path: Path
    layers: tuple[str, ...]
    targets: tuple[str, ...]
    images: int
    skipped: dict[str, str]
    classes: tuple[str, ...] | None
    seconds: float = 0.0
    forwards: int = 0

    @classmethod
    def open(cls, path: str | PathLike[str], *, seconds: float = 0.0, forwards: int = 0) -> Scan:
        """The scan in a folder. Raises `StoreError` if there is none, or one that is not complete."""
        store = Store.open(path)
        store.require_complete()
        classes, targets = store.about["classes"], tuple(store.about["targets"])
        layers = dict.fromkeys(what for what, _, _ in store.statistics if what != ", ".join(targets))
        left_out = skipped(store)
        return cls(
            Path(path),
            tuple(layers),
            targets,
            int(store.made_by["images"]) - len(left_out),
            {_name(store, index): why for index, why in left_out.items()},
            None if classes is None else tuple(classes),
            seconds,
            forwards,
        )

    def features(self, layer: object = None) -> FeatureSet:
        """The mean vector of every image at a layer, with labels, file names and scores."""
        return stored_features(self.path, layer)

    def extremes(self, layer: object, *, largest: bool = True) -> Extremes:
        """Where each channel of a layer is largest, or smallest."""
        found: Extremes = self._merged(Top, layer, largest=largest)
        return found

    def moments(self, layer: object) -> tuple[Tensor, Tensor]:
        """The mean `[C]` and variance `[C]` of each channel of a layer over all images and positions, in float64."""
        found: tuple[Tensor, Tensor] = self._merged(Moments, layer)
        return found

    def _merged(self, kind: type[Top | Moments], layer: object, **wanted: object) -> Any:
        store = Store.open(self.path)
        for place, (what, name, options) in enumerate(store.statistics):
            if (what, name) == (str(layer), kind.__name__) and wanted.items() <= options.items():
                statistic = kind(**options)
                _, damaged = merged(store, [statistic], [place])
                if damaged:
                    raise StoreError(f"block {min(damaged)} of {self.path} is damaged; the same scan does it again")
                return statistic.compute()
        known = dict.fromkeys(what for what, name, _ in store.statistics if name == kind.__name__)
        raise UnknownName.of("layer", layer, known, f"in {self.path}")


def _name(store: Store, index: int) -> str:
    """What to call an image that a store has seen."""
    size = store.computing["block_size"]
    facts = facts_of(store, index // size) if store.about["folder"] is not None else {}
    return str(Path(store.about["folder"], facts["names"][index % size])) if facts else f"image {index}"
