"""The page to look through suspicious labels, with everything it needs in one file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchloupe_core import registry
from torchloupe_core.errors import BadInput
from torchloupe_core.page import KIND, sheet
from torchloupe_core.results import write_whole
from torchloupe_core.suspects import SCORES, THUMBNAIL, Suspects

__all__ = ["write_page"]

TEMPLATE = Path(__file__).parent / "pages" / "suspects.html"
ACROSS, EACH = 20, 400  # pictures in a row of a sheet, and in a sheet


def write_page(found: Suspects, path: Path, k: int, title: str | None, report: Callable[[int, int], None]) -> Path:
    """Writes the page, whole or not at all. Raises `BadInput` before any picture is read, `StoreError` at the end."""
    if k < 1:
        raise BadInput(f"k is at least 1; got {k}")
    orders = [found.order(score)[:k] for score in (None, *found.score_names)]
    rows = torch.tensor(list(dict.fromkeys(torch.stack(orders, 1).flatten().tolist())))
    sheets = []
    for begin in range(0, len(rows), EACH):
        tiles = found.thumbnails(rows[begin : begin + EACH], THUMBNAIL)
        sheets.append(sheet(tiles, ACROSS))
        report(begin + len(tiles), len(rows))
    facts = {
        "sheet": {"size": THUMBNAIL, "across": ACROSS, "each": EACH, "kind": KIND},
        "scores": [{"name": name, "title": SCORES.get(name, name)} for name in found.score_names],
        "items": [_item(found, row) for row in rows.tolist()],
        "k": k,
    }
    text: str = registry.find("render", "jinja2.render").run(
        TEMPLATE,
        title=title or f"Suspicious labels among {len(found):,} images",
        subtitle=_subtitle(found, len(rows)),
        facts=facts,
        sheets=sheets,
        rows=[math.ceil(min(EACH, len(rows) - begin) / ACROSS) for begin in range(0, len(rows), EACH)],
    )
    target = path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")
    write_whole(target, text.encode())
    return target


def _item(found: Suspects, row: int) -> dict[str, Any]:
    return {
        "index": int(found.indices[row]),
        "name": found.name(row),
        "given": found.class_name(int(found.labels[row])),
        "seen": found.class_name(int(found.predictions[row])),
        "sure": round(found.confidences[row].item(), 4),
        "shares": [round(share, 5) for share in found.shares[:, row].tolist()],
    }


def _subtitle(found: Suspects, shown: int) -> str:
    parts = [f"{shown:,} most suspicious of {len(found):,}", f"{found.k} neighbours"]
    if found.skipped:
        parts.append(f"{len(found.skipped)} images could not be read")
    return ", ".join(parts)
