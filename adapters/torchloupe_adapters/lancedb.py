"""LanceDB: the vectors of a store in a table, for queries.

The blocks of a store are its record. The table is made from them, one append a block, and can be made anew. Each row
names its block, so that a block is appended once however often that is interrupted, and carries the block's checksum.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.errors import MissingDependency, StoreError
from torchloupe_core.registry import method
from torchloupe_core.store import LOCK, VECTORS, Store
from torchloupe_core.stored import Rows, facts_of
from torchloupe_core.writers import Crew, Writer

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["require_installed", "table", "table_name"]

PLACE = -1  # of the lock that ranks append under
UNREADABLE = (RuntimeError, ValueError, OSError, KeyError)  # what comes of files that are not as they were written


_NO = torch.empty(0, dtype=torch.long)
NONE = Rows(_NO, _NO, torch.empty(0, 0), torch.empty(0, 0), None)


@method("features", "lancedb.table", cost="no forward")
def table(store: Store, layer: str, rows: Callable[[int], Rows]) -> Rows:
    """All rows of a layer's vectors. Blocks that the table lacks are appended; a table that is damaged is made anew.

    rows: those of a block. Raises `StoreError` if the store is being written, or does not keep what is written.
    """
    kept = _Table(store, layer)
    with contextlib.suppress(_Damaged):
        rows_there, blocks = kept.content()
        if not kept.lacking(blocks):
            return rows_there
    with Writer(store.path / LOCK, Crew.present()) as writer, writer.alone_at(PLACE):
        try:
            kept.fill(rows)
            return kept.content()[0]
        except (*UNREADABLE, _Damaged) as error:
            raise StoreError(f"{store.path / VECTORS} cannot be written: {error}") from error


def require_installed() -> ModuleType:
    """The package. Raises `MissingDependency`."""
    try:
        import lancedb
    except ImportError as error:
        raise MissingDependency.of("lancedb", "store") from error
    # It warns whenever a process forks, as loaders do to read images; those children do not use it.
    warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
    found: ModuleType = lancedb
    return found


def table_name(layer: str) -> str:
    """A layer's name in the letters that LanceDB takes."""
    return re.sub(r"[^A-Za-z0-9.-]", lambda found: f"_{ord(found[0]):x}_", layer)


class _Damaged(Exception):
    """The table is not what was written."""


class _Table:
    def __init__(self, store: Store, layer: str) -> None:
        self.store, self.name = store, table_name(layer)
        self.folder = store.path / VECTORS
        self.database = require_installed().connect(self.folder)

    def content(self) -> tuple[Rows, list[int]]:
        """The rows that are there, and the blocks they are of. Raises `_Damaged`."""
        if not self._made():
            return NONE, []
        try:
            content = self.database.open_table(self.name).to_arrow()
            if (content.schema.metadata or {}).get(b"store") != self.store.digest.encode():
                raise _Damaged("it is of another store")
            rows, checks = _rows(content), _tensor(content["check"])
            blocks = _tensor(content["block"]).numpy()
        except UNREADABLE as error:
            raise _Damaged(str(error)) from error
        starts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist()]
        for start, stop in zip(starts, [*starts[1:], len(blocks)], strict=True):
            if not bool((checks[start:stop] == _check(rows, start, stop)).all()):
                raise _Damaged(f"block {blocks[start]} is not what was written")
        if len(np.unique(rows.indices)) != len(rows.indices):
            raise _Damaged("an image is there twice")
        return rows, np.unique(blocks).tolist()

    def lacking(self, blocks: Sequence[int]) -> list[int]:
        """The blocks whose images have no rows."""
        absent = set(range(self.store.count)) - set(blocks)
        return [block for block in sorted(absent) if facts_of(self.store, block)["images"]]

    def fill(self, rows: Callable[[int], Rows]) -> None:
        """Appends the blocks that are lacking, all of them if the table is damaged."""
        opened, blocks = None, list[int]()
        with contextlib.suppress(_Damaged):
            _, blocks = self.content()
        if blocks:
            opened = self.database.open_table(self.name)
        else:
            shutil.rmtree(self.folder / f"{self.name}.lance", ignore_errors=True)
        for block in self.lacking(blocks):
            part = _arrow(block, rows(block), self.store.digest)
            if opened is None:
                opened = self.database.create_table(self.name, part)
            else:
                opened.add(part)

    def _made(self) -> bool:
        """Whether there is a table; what was killed before its first rows is none."""
        return (self.folder / f"{self.name}.lance" / "_versions").is_dir()


def _arrow(block: int, rows: Rows, store: str) -> pa.Table:
    import pyarrow as pa

    columns: dict[str, Any] = {
        "index": pa.array(rows.indices.numpy()),
        "block": pa.array([block] * len(rows.indices), pa.int64()),
        "image": pa.array(_names(rows), pa.string()),
        "label": pa.array(rows.labels.numpy()),
        "vector": _lists(rows.vectors),
        "check": pa.array([_check(rows, 0, len(rows.indices))] * len(rows.indices), pa.int64()),
    }
    if rows.scores.shape[1]:
        columns["scores"] = _lists(rows.scores)
    return pa.table(columns).replace_schema_metadata({"store": store})


def _lists(values: Tensor) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.contiguous().numpy().reshape(-1)), values.shape[1])


def _rows(content: pa.Table) -> Rows:
    names = content["image"].to_pylist()
    scores = _tensor(content["scores"]) if "scores" in content.column_names else torch.empty(len(content), 0)
    return Rows(
        _tensor(content["index"]),
        _tensor(content["label"]),
        _tensor(content["vector"]),
        scores,
        None if None in names else names,
    )


def _tensor(column: Any) -> Tensor:
    """A column of numbers `[M]`, or of lists of one length `[M, D]`."""
    whole = column.combine_chunks()
    size = getattr(whole.type, "list_size", None)
    if size is None:
        return torch.from_numpy(whole.to_numpy(zero_copy_only=False).copy())
    return torch.from_numpy(whole.flatten().to_numpy(zero_copy_only=False).reshape(-1, size).copy())


def _check(rows: Rows, start: int, stop: int) -> int:
    """The CRC-32 of some rows."""
    found = zlib.crc32(repr(_names(rows)[start:stop]).encode())
    for values in (rows.indices, rows.labels, rows.vectors, rows.scores):
        found = zlib.crc32(values[start:stop].contiguous().numpy().tobytes(), found)
    return found


def _names(rows: Rows) -> list[str | None]:
    return [None] * len(rows.indices) if rows.names is None else list(rows.names)
