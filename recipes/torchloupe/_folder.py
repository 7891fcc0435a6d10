"""Explaining pictures from files into files: one picture at a time, what is there already kept.

Each map is a pair, `x.jpg.grad_cam.npz` and then `x.jpg.grad_cam.png`; the drawing holds, as text, what was asked and
what came out, so that a later run knows whether it answers the same question.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import torchloupe as tl
import torchloupe_adapters  # noqa: F401  (says where methods live)
from torchloupe_core import registry
from torchloupe_core.errors import BadInput, LoupeError, StoreError
from torchloupe_core.handle import Handle
from torchloupe_core.images import find
from torchloupe_core.registry import Method
from torchloupe_core.results import Attribution, write_whole

__all__ = ["Question", "Row", "Run", "Way", "chosen", "digest", "named"]

RECORD = "torchloupe"  # the PNG's text chunk
SIMPLE = {"int", "float", "bool", "str"}  # kinds of options that can be written on a command line
Way = tuple[Method, Mapping[str, Any]]


def chosen(names: Sequence[str], options: Mapping[str, Any], layer: str | None) -> list[Way]:
    """The methods of those names, each once, each with the options it has. One that none of them has is an error."""
    found = list({way.name: way for way in (registry.find("explain", name) for name in names)}.values())
    if not found:
        raise BadInput("no method was given; torchloupe methods explain lists them")
    if layer is not None and not any("layer" in way.needs for way in found):
        raise BadInput(f"{found[0].name} reads the input, not a layer; leave out the layer")
    lost = {key: value for key, value in options.items() if not any(key in way.options for way in found)}
    if lost:
        raise BadInput("; ".join(_complaint(way, lost) for way in found))
    return [(way, _checked(way, options)) for way in found]


def _complaint(way: Method, options: Mapping[str, Any]) -> str:
    try:
        way.check_options(options)
    except BadInput as error:
        return str(error)
    return ""


def _checked(way: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options this method has. Raises `BadInput` for a text where a number belongs and the like."""
    parameters = inspect.signature(way.run).parameters
    own = {key: value for key, value in options.items() if key in way.options}
    for key, value in own.items():
        kinds = {part.strip() for part in str(parameters[key].annotation).split("|")}
        fits = {type(value).__name__, "float" if type(value) is int else ""} & kinds
        if not fits and kinds & {*SIMPLE, "Tensor"}:
            wanted = " or ".join(sorted(kinds & SIMPLE)) or "a tensor, which only Python can give"
            raise BadInput(f"option {key} of {way.name} takes {wanted}; got {value!r}")
    return own


def named(given: Sequence[Path], out: Path) -> dict[str, Path]:
    """Every picture under the name its files go by: its path below the folder given, or its file name.

    If two would share a name, all go by their paths below the folder they have in common.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for path in given:
        if not path.exists():
            raise BadInput(f"no such image file: {path}")
        files = [file for file in find(path) if not _is_drawing(file, out)] if path.is_dir() else [path]
        for file in files:
            name = str(file.relative_to(path if path.is_dir() else path.parent))
            found.setdefault(_place(file), (name, file))
    if not found:
        raise BadInput(f"no images in {', '.join(map(str, given))} but what torchloupe wrote there")
    if len({name for name, _ in found.values()}) < len(found):
        common = os.path.commonpath([place.parent for place in found])
        return {str(place.relative_to(common)): file for place, (_, file) in found.items()}
    return dict(found.values())


def _is_drawing(file: Path, out: Path) -> bool:
    """Whether a picture is an earlier run's own, where the folder to write in lies among the pictures."""
    return file.suffix == ".png" and file.with_suffix(".npz").exists() and _place(file).is_relative_to(out.resolve())


def _place(file: Path) -> Path:
    return file.parent.resolve() / file.name  # a link to a picture is a picture of its own


def digest(path: Path) -> str:
    """Of a file's content. Raises `BadInput`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Question:
    """What is asked of every picture. settings: what the answers depend on besides."""

    handle: Handle
    target: str | None
    layer: str | None
    seed: int
    batch_size: int | None
    progress: bool | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What became of one picture and method. answer: target, score, layer, seconds, forwards; empty if not known."""

    image: Path
    method: str
    answer: Mapping[str, Any]
    png: Path
    npz: Path
    kept: bool


@dataclass
class Run:
    """Pictures explained one after the other, and the count of what became of them.

    tell: is given a row for each map written or kept; say: a line for each thing that went wrong.
    """

    question: Question
    ways: list[Way]
    out: Path
    overwrite: bool
    tell: Callable[[Row], None]
    say: Callable[[str], None]
    written: int = 0
    kept: int = 0
    stale: int = 0
    failed: set[Path] = field(default_factory=set)
    proven: set[str] = field(default_factory=set)

    def picture(self, name: str, path: Path) -> None:
        """Every map of one picture that is not there yet. What is wrong with the picture is reported."""
        inputs = None
        try:
            content = digest(path)
            for way, options in list(self.ways):
                asked = {**self.question.settings, "layer": self._layer(way), "options": options, "picture": content}
                png = self.out / f"{name}.{way.name}.png"
                if not self.overwrite and all(os.access(one, os.F_OK) for one in (png, png.with_suffix(".npz"))):
                    self._keep(path, png, way, asked)
                    continue
                inputs = self.question.handle.inputs(path) if inputs is None else inputs
                found = self._explained((way, options), inputs, path)
                if found is not None:
                    self._write(path, png, found, asked)
        except BadInput as error:
            self._fail(path, error)
        except StoreError as error:
            if getattr(error.__cause__, "errno", None) != errno.ENAMETOOLONG:
                raise  # a full disk is every picture's trouble
            self._fail(path, error)

    def _explained(self, chosen: Way, inputs: torch.Tensor, path: Path) -> Attribution | None:
        """The map, or None after a report. A method that fails the first time is left out from then on."""
        (way, options), asked = chosen, self.question
        try:
            found = tl.explain(
                asked.handle,
                inputs,
                target=asked.target,
                method=way.name,
                layer=self._layer(way),
                seed=asked.seed,
                batch_size=asked.batch_size,
                progress=asked.progress,
                **options,
            )
        except LoupeError as error:
            if way.name in self.proven:
                self._fail(path, error)
            elif len(self.ways) == 1:
                raise LoupeError(str(error)) from error  # not the picture's fault
            else:
                self.ways.remove(chosen)
                self.say(f"{way.name} is left out: {_line(error)}")
            return None
        self.proven.add(way.name)
        return found

    def _layer(self, way: Method) -> str | None:
        return self.question.layer if "layer" in way.needs else None

    def _write(self, path: Path, png: Path, found: Attribution, asked: Mapping[str, Any]) -> None:
        answer = {"target": found.targets[0], "score": found.scores[0].item(), "layer": found.layer}
        answer |= {"seconds": round(found.seconds, 3), "forwards": found.forwards}
        drawing = io.BytesIO()
        record = json.dumps({"asked": asked, "answer": answer})
        found.figure().savefig(drawing, format="png", dpi=100, metadata={RECORD: record})
        npz = found.save(png.with_suffix(".npz"))
        write_whole(png, drawing.getvalue())  # last: with it the pair is complete
        self.written += 1
        self.tell(Row(path, found.method, answer, png, npz, kept=False))

    def _keep(self, path: Path, png: Path, way: Method, asked: Mapping[str, Any]) -> None:
        """Counts a map that is there, and whether it answers another question."""
        record = _record(png)
        self.kept += 1
        self.stale += record.get("asked") != asked
        self.tell(Row(path, way.name, record.get("answer", {}), png, png.with_suffix(".npz"), kept=True))

    def _fail(self, path: Path, error: LoupeError) -> None:
        self.failed.add(path)
        text = _line(error)
        self.say(text if str(path) in text else f"{path}: {text}")

    def __str__(self) -> str:
        counts = {
            "written": self.written,
            "kept (--overwrite makes them anew)": self.kept,
            "of those made from another picture or with other settings": self.stale,
        }
        parts = [f"{number} {what}" for what, number in counts.items() if number or what == "written"]
        if self.failed:
            parts.append(f"{len(self.failed)} {'picture' if len(self.failed) == 1 else 'pictures'} failed")
        return "maps: " + ", ".join(parts)


def _record(png: Path) -> dict[str, Any]:
    """What a drawing says of itself, nothing if it is not one."""
    try:
        with Image.open(png) as image:
            found: dict[str, Any] = json.loads(image.info[RECORD])
            return found
    except (OSError, SyntaxError, KeyError, ValueError):
        return {}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
