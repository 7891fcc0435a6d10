"""One page of an embedding that needs nothing else: points, columns and small pictures in the file itself."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from torchloupe_core import plots, registry
from torchloupe_core.columns import Column, ColumnLike, column, labels_column
from torchloupe_core.embedding import Embedding
from torchloupe_core.errors import BadInput
from torchloupe_core.plots_embedding import PALETTE, UNKNOWN
from torchloupe_core.results import write_whole
from torchloupe_core.thumbnails import natural_size

__all__ = ["KIND", "sheet", "write_page"]

Report = Callable[[int, int], None]

TEMPLATE = Path(__file__).parent / "pages" / "embedding.html"
SIZES = (96, 64, 48, 32, 24, 16)  # pixels across a small picture
SHEET = 2048  # pixels across a sheet of them
PILOT = 128  # pictures that tell how many bytes one takes
QUALITY = 75
KIND = "data:image/webp;base64,"
CLOSE_UP = 150  # points in sight at most, for their pictures to stand in for them
SHADES = 64


def write_page(
    found: Embedding,
    path: Path,
    columns: Mapping[str, ColumnLike],
    *,
    pictures: bool,
    budget: float,
    title: str | None,
    report: Report,
) -> Path:
    """Writes the page, whole or not at all. Raises `BadInput` before any picture is read, `StoreError` at the end."""
    if found.dims != 2:
        raise BadInput(f"a page shows two dimensions; this embedding has {found.dims}, ask with dims=2")
    if not 0 < budget < math.inf:
        raise BadInput(f"budget is how many megabytes pictures may take; got {budget}")
    shown = [labels_column(found.labels, found.classes)] if found.labelled else []
    shown += [column(name, values, len(found)) for name, values in columns.items()]
    sheets = _sheets(found, budget * 1e6, report) if pictures else NONE
    points, span = _points(found.points)
    facts = {
        "count": len(found),
        "span": span,
        "columns": [{"title": one.title, "kinds": one.kinds, "ends": one.ends} for one in shown],
        "palette": PALETTE,
        "unknown": UNKNOWN,
        "ramp": _ramp(),
        "closeUp": CLOSE_UP,
        "sheets": sheets.facts,
    }
    text: str = registry.find("render", "jinja2.render").run(
        TEMPLATE,
        title=title or f"{len(found):,} images at {found.layer}",
        subtitle=_subtitle(found, sheets),
        count=f"{len(found):,}",
        facts=facts,
        names=_short_names(found.names) if found.names is not None else found.indices.tolist(),
        points=_coded(points),
        rows="" if sheets.rows is None else _coded(sheets.rows.numpy().astype(np.uint32)),
        columns=[_coded(_numbers(one)) for one in shown],
        sheets=sheets.texts,
    )
    target = path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")
    write_whole(target, text.encode())
    return target


# -- points and columns -----------------------------------------------------------------------------------------------


def _points(points: Tensor) -> tuple[NDArray[np.uint16], tuple[float, float]]:
    """`[N, 2]` in 65535ths of the longer side, and how far they reach along each."""
    points = points.double()
    low, reach = points.amin(0), (points.amax(0) - points.amin(0))
    longer = float(reach.max()) or 1.0  # a single point
    unit = (points - low) / longer
    spans = (reach / longer).clamp(min=0.01).tolist()
    return (unit * 65535).round().numpy().astype(np.uint16), (spans[0], spans[1])


def _numbers(shown: Column) -> NDArray[Any]:
    if shown.kinds is None:
        return shown.values.numpy().astype(np.float32)
    return shown.codes.numpy().astype(np.uint16)  # -1, unknown, becomes 65535


def _coded(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _ramp() -> list[str]:
    shades = (plots.colours(torch.arange(SHADES).float()[None], False)[:, 0].T * 255).round().int().tolist()
    return ["#{:02x}{:02x}{:02x}".format(*shade) for shade in shades]


def _short_names(names: Sequence[str]) -> list[str]:
    """Without the folder that all of them are in."""
    folder = os.path.commonpath([Path(name).parent for name in names])
    return [os.path.relpath(name, folder) if folder else name for name in names]


def _subtitle(found: Embedding, sheets: _Sheets) -> str:
    trust = found.diagnostics.get("trustworthiness")
    parts = [found.method, *([] if trust is None else [f"trustworthiness {trust:.3f}"])]
    if sheets.rows is not None:
        parts.append(f"pictures of {len(sheets.rows):,} of {len(found):,} images, drawn at random")
    if found.skipped:
        parts.append(f"{len(found.skipped)} images could not be read")
    return ", ".join(parts)


# -- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sheets:
    """Small pictures side by side in large ones, in base64, and which rows they are of; None for all."""

    texts: tuple[str, ...]
    size: int
    across: int
    rows: Tensor | None

    @property
    def facts(self) -> dict[str, Any]:
        """What the page needs to know to find a picture."""
        each = self.across**2
        return {"size": self.size, "across": self.across, "each": each, "kind": KIND, "rows": self.rows is not None}


NONE = _Sheets((), 0, 0, None)


def _sheets(found: Embedding, room: float, report: Report) -> _Sheets:
    """Pictures as large as the room for them allows, or of fewer images where even the smallest are too many."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(found.seed))
    size, count = _affordable(found, order[:PILOT].sort().values, room)
    rows = torch.arange(len(found)) if count == len(found) else order[:count].sort().values
    across = min(SHEET // size, math.ceil(math.sqrt(len(rows))))
    texts = []
    for start in range(0, len(rows), across**2):
        tiles = found.thumbnails(size, rows[start : start + across**2])
        texts.append(sheet(tiles, across))
        report(start + len(tiles), len(rows))
    return _Sheets(tuple(texts), size, across, None if count == len(found) else rows)


def _affordable(found: Embedding, pilot: Tensor, room: float) -> tuple[int, int]:
    """How large the pictures are, and of how many images."""
    natural = natural_size(found)
    sizes = [size for size in SIZES if size <= max(natural, SIZES[-1])]
    large = found.thumbnails(sizes[0], pilot)
    for size in sizes:
        tiles = large if size == sizes[0] else _reduced(large, size)
        each = len(sheet(tiles, math.ceil(math.sqrt(len(tiles))))) / len(tiles)
        if each * len(found) <= room:
            return size, len(found)
    return sizes[-1], max(1, int(room / each))


def _reduced(tiles: Tensor, size: int) -> Tensor:
    found = torch.nn.functional.interpolate(tiles.float(), (size, size), mode="area")
    return found.round().to(torch.uint8)


def sheet(tiles: Tensor, across: int) -> str:
    """Tiles `[T, 3, s, s]` as one picture, in base64."""
    size, down = tiles.shape[2], math.ceil(len(tiles) / across)
    whole = torch.full((down * across, 3, size, size), 255, dtype=torch.uint8)
    whole[: len(tiles)] = tiles
    picture = whole.view(down, across, 3, size, size).permute(0, 3, 1, 4, 2).reshape(down * size, across * size, 3)
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="webp", quality=QUALITY, method=2)
    return base64.b64encode(buffer.getvalue()).decode()
