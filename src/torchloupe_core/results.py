"""What the verbs return: frozen dataclasses, raw data first, with where it came from.

Every result saves itself as one `.npz` file, arrays as they are and everything else as JSON under the key
`provenance`; `open_result` reads it back without pickle.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import tempfile
import time
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput, NotApplicable, StoreError
from torchloupe_core.methods.localisation import CAM_BOX_THRESHOLD, Box, boxes_around
from torchloupe_core.recorded import Outputs
from torchloupe_core.targets import Target, TargetLike, as_targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Attribution", "Result", "open_result"]


# Kinds that live in files of their own, read when one of them is opened.
_HOMES = {
    "Activations": "torchloupe_core.activations",
    "Audit": "torchloupe_core.audit",
    "Comparison": "torchloupe_core.comparison",
    "Embedding": "torchloupe_core.embedding",
    "Examples": "torchloupe_core.examples",
    "Filters": "torchloupe_core.filters",
    "Fooled": "torchloupe_core.fooled",
    "Grid": "torchloupe_core.evengrid",
    "Influence": "torchloupe_core.influence",
    "Neighbors": "torchloupe_core.neighbors",
    "Gallery": "torchloupe_core.gallery",
    "Suspects": "torchloupe_core.suspects",
    "Validation": "torchloupe_core.validation",
    "Stylizer": "torchloupe_core.stylizer",
    "Visualization": "torchloupe_core.visualization",
}

UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Result:
    """Parent of every result: saving, loading, showing.

    method, backend: who did the work. seed: of everything random. seconds, forwards: what it took, images through the
    model. versions: of the packages involved. options: of the method.
    """

    kinds: ClassVar[dict[str, type[Result]]] = {}
    drawings: ClassVar[str] = "torchloupe_core.plots"  # the module that draws this kind

    method: str
    backend: str
    seed: int
    seconds: float
    forwards: int
    versions: Mapping[str, str]
    options: Mapping[str, Any]

    def __init_subclass__(cls) -> None:
        Result.kinds[cls.__name__] = cls

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the result to an `.npz` file, whole or not at all, and returns where. Raises `StoreError`."""
        target = Path(path)
        if target.suffix != ".npz":
            target = target.with_name(target.name + ".npz")
        arrays: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                arrays[one.name] = value.numpy()
            else:
                rest[one.name] = value
        provenance = json.dumps({"kind": type(self).__name__, **rest}, default=_plain)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, provenance=np.array(provenance), **arrays)
        write_whole(target, buffer.getvalue())
        return target

    def plot(self, **options: Any) -> tuple[Any, Any]:
        """Draws the result with pyplot; returns `(figure, axes)`."""
        from torchloupe_core import plots

        return plots.show(self, **options)

    def figure(self, **options: Any) -> Figure:
        """The same drawing as a figure of its own, outside pyplot, for saving."""
        from torchloupe_core import plots

        return plots.figure(self, **options)

    def _repr_png_(self) -> bytes:
        from torchloupe_core import plots

        return plots.png(self)


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """Where in each image the target came from.

    values: `[N, h, w]` float32, raw, signed, at the method's own resolution; positive values speak for the target.
    images: `[N, 3, H, W]` in [0, 1], what the model was shown. scores: the target's value for each image, `[N]`.
    target: its canonical text, or one text for each image. layer: the layer read, None for methods on the input.
    per_channel: `[N, C, H, W]`, the share of each input channel, where the method gives one.
    signed: whether negative values mean evidence against. diagnostics: what the method knows of its own quality; a list
    holds one entry for each image. standard_error: `[N, h, w]`, of the values, where the method samples.
    outputs: `[N, 1 + n, K]` float32, the model's output for each image itself and its n variants, where they were kept
    for `of`; classes: their names. backwards: of how many images, and variants of images, a gradient was taken.
    """

    values: Tensor
    images: Tensor
    scores: Tensor
    target: str | tuple[str, ...]
    layer: str | None = None
    signed: bool = True
    per_channel: Tensor | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    standard_error: Tensor | None = None
    outputs: Tensor | None = None
    classes: tuple[str, ...] | None = None
    backwards: int = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Attribution:
        """The attribution of one image."""
        index = range(len(self))[index]
        per_image = {"values", "images", "scores", "per_channel", "standard_error", "outputs"}
        changes: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in per_image:
            if changes[name] is not None:
                changes[name] = changes[name][index : index + 1]
        changes["target"] = self.targets[index]
        changes["diagnostics"] = {
            name: value[index : index + 1] if isinstance(value, list) else value
            for name, value in self.diagnostics.items()
        }
        return Attribution(**changes)

    @property
    def targets(self) -> tuple[str, ...]:
        """The target of each image."""
        return (self.target,) * len(self) if isinstance(self.target, str) else self.target

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.images.shape[2], self.images.shape[3]

    def of(self, target: TargetLike | Sequence[TargetLike]) -> Attribution:
        """The attribution of another target that reads the model's output, from the same run: no forward pass.

        For a method asked with `classes=True`. Its seconds are those of this step. Raises `NotApplicable`.
        """
        from torchloupe_core import registry

        again = registry.find("explain", self.method).again
        if self.outputs is None or again is None:
            raise NotApplicable(
                "this result holds no outputs of the model to answer from; rise and sobol keep them with classes=True"
            )
        begun, asked = time.perf_counter(), as_targets(target, len(self))
        kept = [Outputs(one, self.classes) for one in self.outputs]
        scores = torch.stack([one.score(target) for one, target in zip(kept, asked, strict=True)])  # [N, 1 + n]
        found = again(self, scores[:, 1:])
        return replace(
            self,
            values=found.values,
            standard_error=found.standard_error,
            diagnostics=dict(found.diagnostics),
            scores=scores[:, 0],
            target=texts(asked),
            seconds=time.perf_counter() - begun,
            forwards=0,
            backwards=0,
        )

    def upsample(self) -> Tensor:
        """`[N, H, W]`: the values at the images' resolution, bilinearly."""
        if self.values.shape[1:] == self.images.shape[2:]:
            return self.values
        return F.interpolate(self.values[:, None], self.size, mode="bilinear", align_corners=False)[:, 0]

    def normalize(self, how: Literal["minmax", "absmax", "none"] = "minmax") -> Tensor:
        """`[N, h, w]`, each image by itself: "minmax" to [0, 1], "absmax" to [-1, 1] with zero kept, "none" as is."""
        if how == "none":
            return self.values
        flat = self.values.flatten(1)
        if how == "absmax":
            largest = flat.abs().amax(1)[:, None, None]
            return self.values / largest.where(largest > 0, 1.0)
        if how == "minmax":
            low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
            return (self.values - low) / (high - low).where(high > low, 1.0)
        raise BadInput(f'normalize takes "minmax", "absmax" or "none"; got {how!r}')

    def mask(self, *, quantile: float = 0.9) -> Tensor:
        """`[N, H, W]` bool: the pixels above a quantile of their own image's values."""
        if not 0 <= quantile < 1:
            raise BadInput(f"quantile is a share from 0 to below 1; got {quantile}")
        values = self.upsample()
        ordered = values.flatten(1).sort(1).values
        threshold = ordered[:, int(quantile * (ordered.shape[1] - 1))]
        return values > threshold[:, None, None]

    def boxes(self, *, threshold: float = CAM_BOX_THRESHOLD) -> list[list[Box]]:
        """For each image the boxes `(top, left, bottom, right)` around what exceeds a share of the maximum.

        One box a connected region, in input pixels, bottom and right exclusive, the heaviest region first.
        """
        return boxes_around(self.upsample(), threshold)

    def segment(self) -> Tensor:
        """`[N, H, W]` bool: the object the map points at, cut out by GrabCut (Rother 2004) seeded with the map."""
        from torchloupe_core import registry

        grabcut = registry.find("segment", "opencv.grabcut")
        masks: Tensor = grabcut.run(self.images, self.upsample())
        return masks

    def overlay(self, *, alpha: float = 0.6) -> Tensor:
        """`[N, 3, H, W]` in [0, 1]: the map in colour over each image."""
        from torchloupe_core import plots

        return plots.overlay(self, alpha=alpha)


def texts(targets: Sequence[Target]) -> str | tuple[str, ...]:
    """The canonical text of each image's target, or one text if they are the same."""
    found = tuple(map(str, targets))
    return found[0] if len(set(found)) == 1 else found


def open_result(path: str | os.PathLike[str]) -> Result:
    """The result saved at `path`. Raises `StoreError` if it is not one."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            provenance = json.loads(str(stored["provenance"]))
            arrays = {name: torch.from_numpy(stored[name].copy()) for name in stored.files if name != "provenance"}
        kind = str(provenance.pop("kind", None))
    except FileNotFoundError:
        raise StoreError(f"no such file: {path}") from None
    except (*UNREADABLE, AttributeError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a saved torchloupe result: {error}") from error
    if kind in _HOMES:
        importlib.import_module(_HOMES[kind])
    if kind not in Result.kinds:
        raise StoreError(f"{path} holds a {kind!r}, which this version of torchloupe does not know")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in provenance.items()
    }
    try:
        return Result.kinds[kind](**{**values, **arrays})
    except TypeError as error:
        raise StoreError(f"{path} holds an {kind} whose fields are not those of this version: {error}") from error


def write_whole(path: Path, content: bytes, *, lasting: bool = False) -> None:
    """Writes a file so that it is there whole or as it was before. Raises `StoreError`.

    lasting: it is on the disk, not only on its way there, when this returns.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        if lasting:
            _sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # where it could not be made, as for a name that is too long
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a renaming last."""
    with contextlib.suppress(OSError):  # not every system opens folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it was not there. Raises `StoreError`, before any work, if nothing can be written in it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise StoreError(f"cannot write into {folder}: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return str(value)
