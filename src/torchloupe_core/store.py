"""A folder that holds a scan: what it was made by, and what every statistic saw of each block of images.

    manifest.json          model, weights, preprocessing, statistics, data set, and how all of it is computed
    blocks/00000012.npz    block 12: states of the statistics, labels, file names, what could not be read
    lock                   held by who writes
    vectors/               the features once more, in a table for queries, where there is one

A block is there whole or not at all, and carries the SHA-256 of itself and of the manifest, so that one that was cut
off, changed or put there from elsewhere is noticed. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.errors import StoreError
from torchloupe_core.results import UNREADABLE, write_whole

__all__ = ["FORMAT", "LOCK", "Damaged", "Store", "is_store", "packed", "require_free", "unpacked"]

FORMAT = 1
MANIFEST, BLOCKS, LOCK, VECTORS = "manifest.json", "blocks", "lock", "vectors"
DIGEST = 64  # characters of a SHA-256


class Damaged(Exception):
    """A block that is not what was written."""


@dataclass(frozen=True)
class Store:
    """A store that is there. made_by: what may not differ between its runs; computing: how each of them computes;
    about: what else is good to know. The three are those of the manifest.
    """

    path: Path
    made_by: Mapping[str, Any]
    computing: Mapping[str, int]
    about: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """The store in a folder. Raises `StoreError` if there is none, or one of another version."""
        folder = Path(path)
        try:
            facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = facts["format"]
        except FileNotFoundError:
            raise StoreError(f"{folder} is no store: it holds no {MANIFEST}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder / MANIFEST} cannot be read: {error}") from error
        if version != FORMAT:
            raise StoreError(f"{folder} is a store of format {version}; this version of torchloupe reads {FORMAT}")
        try:
            return cls(folder, facts["made_by"], facts["computing"], facts["about"])
        except KeyError as error:
            raise StoreError(f"{folder / MANIFEST} cannot be read: it lacks {error}") from error

    @classmethod
    def make(
        cls, path: Path, made_by: Mapping[str, Any], computing: Mapping[str, int], about: Mapping[str, Any]
    ) -> Store:
        """The store in a folder, made if there is none. Of several that make it at once one does."""
        facts = {"format": FORMAT, "made_by": made_by, "computing": computing, "about": about}
        manifest, draft = path / MANIFEST, path / f".{MANIFEST}.{uuid.uuid4().hex}.part"
        try:
            (path / BLOCKS).mkdir(parents=True, exist_ok=True)
            write_whole(draft, json.dumps(facts, indent=1).encode(), lasting=True)
            _put(draft, manifest)
        except OSError as error:
            raise StoreError(f"cannot write {manifest}: {error.strerror or error}") from error
        finally:
            draft.unlink(missing_ok=True)
        return cls.open(path)

    @property
    def statistics(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Of each statistic, in order: the layer or targets it is of, its kind, its options."""
        return [(what, kind, options) for what, kind, options in self.made_by["statistics"]]

    @property
    def digest(self) -> str:
        """Of the manifest."""
        facts = json.dumps([self.made_by, self.computing], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def count(self) -> int:
        """How many blocks the data set is cut into."""
        return -(-int(self.made_by["images"]) // self.computing["block_size"])

    def positions(self, block: int) -> range:
        """Which images of the data set a block holds, by their place in its order."""
        size = self.computing["block_size"]
        return range(block * size, min((block + 1) * size, int(self.made_by["images"])))

    def present(self) -> set[int]:
        """The blocks that are there, whole or damaged."""
        try:
            names = [path.name for path in (self.path / BLOCKS).iterdir()]
        except OSError as error:
            raise StoreError(f"{self.path / BLOCKS} cannot be read: {error.strerror}") from error
        return {int(name[:-4]) for name in names if name.endswith(".npz") and name[:-4].isdecimal()}

    def missing(self) -> list[int]:
        """The blocks that are not there, in order."""
        present = self.present()
        return [block for block in range(self.count) if block not in present]

    def write(self, block: int, content: bytes) -> None:
        """Puts a block there, whole or not at all. Raises `StoreError`."""
        write_whole(self._file(block), content, lasting=True)

    def read(self, block: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The arrays of a block and what else it holds. Raises `Damaged` if it is not what was written, or missing."""
        try:
            content = self._file(block).read_bytes()
        except FileNotFoundError:
            raise Damaged(f"block {block} is not there") from None
        except OSError as error:
            raise StoreError(f"{self._file(block)} cannot be read: {error.strerror}") from error
        arrays, rest = unpacked(content)
        if rest.get("block") != block or rest.get("store") != self.digest:
            raise Damaged(f"block {block} belongs elsewhere")
        return arrays, rest

    def read_whole(self, block: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `read`, of a store that was just completed. Raises `StoreError`."""
        try:
            return self.read(block)
        except Damaged as error:
            raise StoreError(f"a block of {self.path} is damaged ({error}); run it again") from error

    def facts(self, block: int) -> dict[str, Any]:
        """What a block holds besides arrays, read by itself. Raises `Damaged`."""
        try:
            with np.load(self._file(block), allow_pickle=False) as stored:
                found: dict[str, Any] = json.loads(str(stored["rest"]))
                return found
        except (*UNREADABLE, KeyError) as error:
            raise Damaged(str(error)) from error

    def damaged(self) -> set[int]:
        """The blocks that are not what was written, or missing."""
        found = set()
        for block in range(self.count):
            try:
                self.read(block)
            except Damaged:
                found.add(block)
        return found

    def require_complete(self) -> None:
        """Raises `StoreError` if blocks are missing."""
        if missing := self.missing():
            raise StoreError(
                f"{self.path} holds {self.count - len(missing)} of {self.count} blocks; "
                "the scan that made it goes on from there"
            )

    def discard(self) -> None:
        """Takes the manifest away, so that another may be made. Raises `StoreError`."""
        try:
            (self.path / MANIFEST).unlink()
        except OSError as error:
            raise StoreError(f"cannot write into {self.path}: {error.strerror}") from error

    def tidy(self) -> None:
        """Takes away what writers that were killed left half-written. For the only writer."""
        for leftover in [*self.path.glob(".*.part"), *(self.path / BLOCKS).glob(".*.part")]:
            with contextlib.suppress(OSError):
                leftover.unlink()

    def _file(self, block: int) -> Path:
        return self.path / BLOCKS / f"{block:08d}.npz"


def _put(draft: Path, path: Path) -> None:
    """Gives a file its name unless that is taken."""
    with contextlib.suppress(FileExistsError):
        try:
            os.link(draft, path)
        except PermissionError:  # a file system without hard links
            if not path.exists():
                draft.replace(path)


def is_store(path: object) -> bool:
    """Whether a path names a store."""
    return isinstance(path, (str, os.PathLike)) and (Path(path) / MANIFEST).is_file()


def require_free(path: Path) -> None:
    """Raises `StoreError`, before any work, where something else is in the way of a store."""
    try:
        others = [one.name for one in path.iterdir() if one.name not in {MANIFEST, BLOCKS, LOCK, VECTORS}]
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be a store: {error.strerror}") from error
    others = [name for name in others if not name.endswith(".part")]
    if others and not is_store(path):
        raise StoreError(f"{path} is no store, but a folder with {others[0]!r} in it; name an empty or a new one")


def packed(arrays: Mapping[str, Tensor], rest: Mapping[str, Any]) -> bytes:
    """Arrays of any type and what JSON can say, as an `.npz` whose comment is the SHA-256 of all before it."""
    values, types = {}, {}
    for name, array in arrays.items():
        array = array.detach().cpu().contiguous()
        if array.dtype == torch.bfloat16:  # which numpy does not have
            types[name], array = "bfloat16", array.view(torch.int16)
        values[name] = array.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, rest=np.array(json.dumps({**rest, "types": types})), **values)
    content = buffer.getvalue()[:-2] + DIGEST.to_bytes(2, "little")  # the length of a zip's comment ends it
    return content + hashlib.sha256(content).hexdigest().encode()


def unpacked(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was packed. Raises `Damaged` if a bit of it is not as it was."""
    if hashlib.sha256(content[:-DIGEST]).hexdigest().encode() != content[-DIGEST:]:
        raise Damaged("its SHA-256 is not that of its content")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "rest"}
            rest: dict[str, Any] = json.loads(str(stored["rest"]))
    except (*UNREADABLE, zipfile.LargeZipFile) as error:
        raise Damaged(str(error)) from error
    for name, kind in rest.pop("types").items():
        arrays[name] = arrays[name].view(getattr(torch, kind))
    return arrays, rest
