"""What a scan is of, in words and digests that two scans may be compared by: model, preprocessing, data, question."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchloupe_core.borrow import kept_randomness
from torchloupe_core.dataset import UNREADABLE, DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.images import read_one
from torchloupe_core.scan import Joint
from torchloupe_core.similarity import Picture
from torchloupe_core.spec import Spec
from torchloupe_core.statistics import Statistic

__all__ = ["common_folder", "differences", "of_data", "of_model", "of_question", "places"]

FEWEST, MOST, SHARE = 8, 64, 32  # items of a data set that are looked at where it has no files: one of so many
TWICE = 4  # of them are read again, to see whether they are the same
NAMED = 6  # statistics named in a message
SHORT = 16  # characters of a digest


def of_model(handle: Handle) -> dict[str, Any]:
    """Its name, structure, weights, precision and kind of device, and its preprocessing.

    Structure is what `repr` prints: parts and their settings. Weights are every parameter and buffer, to the bit.
    Preprocessing is what it makes of two pictures of noise, so that two functions that do the same are the same.
    """
    spec, module = handle.spec, handle.module
    return {
        "model": f"{spec.source}/{spec.name}",
        "structure": _digest([f"{type(module).__module__}.{type(module).__qualname__}\n{module!r}".encode()]),
        "weights": _weights(module),
        "precision": str(handle.dtype),
        "device": handle.device.type,
        "layout of tokens": f"{spec.prefix} {dict(spec.layouts)}",
        "preprocessing": spec.preprocess_text or "as it is",
        "preprocessed noise": _preprocessed(spec),
    }


def of_question(
    statistics: Mapping[str, Sequence[Statistic]], joint: Joint | None, autocast: torch.dtype | None
) -> dict[str, Any]:
    """Every statistic by the layer or targets it is of, its kind and its options, in the order of their states."""
    told = [_told(layer, one) for layer, several in statistics.items() for one in several]
    if joint is not None:
        targets = ", ".join(map(str, joint.targets))
        told += [_told(targets, one) for one in joint.statistics]
    return {"statistics": told, "autocast": str(autocast)}


def places(asked: Sequence[Any], stored: Sequence[Any]) -> list[int] | None:
    """Where what is asked for stands among the statistics stored; None unless all of it is there."""
    found = [next((place for place, one in enumerate(stored) if _serves(one, wanted)), None) for wanted in asked]
    return None if None in found else [place for place in found if place is not None]


def _serves(stored: Sequence[Any], asked: Sequence[Any]) -> bool:
    """The same, or the best of more images."""
    (_, kind, options), (*_, wanted) = stored, asked
    if kind == "Top" and wanted.get("k", 0) < options["k"]:
        wanted = {**wanted, "k": options["k"]}
    return [*stored[:2], options] == [*asked[:2], wanted]


def of_data(data: DataSet) -> dict[str, Any]:
    """Of files: names below the folder they share, sizes, times of change. Of others: length, kind, and some items.

    From 8 to 64 items, evenly spread, are looked at; that others among them have changed goes unnoticed. Raises
    `BadInput` for a data set whose items cannot be asked for again: a stream, or one that draws them at random.
    """
    if data.order is None:
        raise BadInput(
            "a stream of images has no places to go on from, so nothing of it can be stored; give a data set with a "
            "length, or leave out store= and engine="
        )
    order = data.order
    found: dict[str, Any] = {"images": len(order)}
    if not np.array_equal(order, range(len(order))):
        found["choice of images"] = _digest([np.asarray(order, dtype=np.int64).tobytes()])
    if data.labels is not None:
        found["labels"] = _digest([np.asarray([data.labels[index] for index in order], dtype=np.int64).tobytes()])
    if data.names is not None:
        return found | _files([data.names[index] for index in order])
    return found | {"kind of data set": type(data.items).__name__, "images looked at": _looked_at(data, order)}


def common_folder(names: Sequence[str]) -> Path:
    """The folder that all of these files lie in."""
    return Path(os.path.commonpath([Path(name).absolute().parent for name in names]))


def differences(given: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """A line for each fact in which two scans differ."""
    lines = []
    for name in dict.fromkeys([*stored, *given]):
        one, other = given.get(name), stored.get(name)
        if one != other:
            lines.append(f"{name}: given {_shown(one, other)}, stored {_shown(other, one)}")
    return lines


def _shown(value: Any, other: Any) -> str:
    """A fact in words; of statistics those that the other scan does not have."""
    if not isinstance(value, list):
        return "nothing" if value is None else str(value)
    own = [one for one in value if one not in (other or ())] or value
    told = []
    for what, kind, options in own:
        told.append(f"{kind}({', '.join(f'{name}={one!r}' for name, one in options.items())}) of {what}")
    return ", ".join(told[:NAMED]) + (f" and {len(told) - NAMED} more" if len(told) > NAMED else "")


def _told(what: str, statistic: Statistic) -> list[Any]:
    return [what, type(statistic).__name__, statistic.options]


def _weights(module: nn.Module) -> str:
    parts: list[bytes] = []
    named: dict[str, Any] = dict(module.state_dict(keep_vars=True))
    named |= dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    digest = hashlib.sha256()
    for name, value in sorted(named.items()):
        if not isinstance(value, Tensor):
            parts.append(f"{name} {value!r}".encode())
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(_bytes(value))
    digest.update(b"".join(parts))
    return digest.hexdigest()[:SHORT]


def _bytes(tensor: Tensor) -> Any:
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _preprocessed(spec: Spec) -> str:
    digests = []
    with kept_randomness():
        for seed, (width, height) in enumerate(((320, 240), (200, 300))):
            noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
            torch.manual_seed(seed)
            try:
                digests.append(_bytes(read_one(Image.fromarray(noise), spec, "noise")).tobytes())
            except UNREADABLE as error:  # a model that takes no pictures
                digests.append(str(error).encode())
    return _digest(digests)


def _files(names: Sequence[str]) -> dict[str, Any]:
    folder, named, times = common_folder(names), hashlib.sha256(), hashlib.sha256()
    for name in names:
        path = Path(name).absolute()
        try:
            facts = path.stat()
            size, changed = facts.st_size, facts.st_mtime_ns
        except OSError:  # it is counted among those that cannot be read
            size, changed = -1, -1
        named.update(f"{path.relative_to(folder)}\0{size}\0".encode(errors="surrogateescape"))
        times.update(f"{changed}\0".encode())
    return {"files": named.hexdigest()[:SHORT], "times of change": times.hexdigest()[:SHORT]}


def _looked_at(data: DataSet, order: Sequence[int]) -> str:
    count = max(FEWEST, min(MOST, len(order) // SHARE))
    places = sorted({round(place) for place in np.linspace(0, len(order) - 1, count)})
    with kept_randomness():
        found = []
        for place in places:
            torch.manual_seed(0)
            found.append(_item(data, order[place]))
        for place, before in zip(places[:TWICE], found, strict=False):
            if _item(data, order[place]) != before:
                raise BadInput(
                    f"{data.name(order[place])} is another one each time it is read, so a scan of it cannot be gone on "
                    "with; take random transformations out of the data set, or leave out store= and engine="
                )
    return _digest(one.encode() for one in found)


def _item(data: DataSet, index: int) -> str:
    """The digest of an item as it is before preprocessing, where that is a picture or a tensor."""
    try:
        image, label = data.taken_apart(data.items[index])
    except UNREADABLE as error:
        return str(error)
    if isinstance(image, (Tensor, np.ndarray, Image.Image)):
        image = Picture.of(image)
    return f"{image} {label}"


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:SHORT]
