"""One page of a comparison that needs nothing else: the numbers, what is to be known, and maps over their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchloupe_core import registry
from torchloupe_core.comparison import Comparison, Row
from torchloupe_core.images import data_uri
from torchloupe_core.plots_comparison import MEASURES, overlays
from torchloupe_core.results import write_whole

__all__ = ["write_page"]

TEMPLATE = Path(__file__).parent / "pages" / "comparison.html"
SMALL, QUALITY = 128, 90  # pixels across that are kept as they are; of larger pictures
ARROWS = {"higher": "↑", "lower": "↓"}


def write_page(found: Comparison, path: Path, title: str | None) -> Path:
    """Writes the page, whole or not at all. Raises `StoreError`."""
    order = _order(found)
    names = [found.methods[place] for place in order]
    columns, cells = _columns(found, order)
    refused: dict[str, list[str]] = {}
    for name, why in found.refused.items():
        refused.setdefault(why, []).append(name)
    text: str = registry.find("render", "jinja2.render").run(
        TEMPLATE,
        title=title or f"{len(found) - len(found.baselines)} methods side by side",
        subtitle=f"{found.values.shape[2]:,} images, torchloupe {found.versions.get('torchloupe', '')}, "
        f"seed {found.seed}",
        found=found,
        columns=columns,
        rows=[
            {"name": name, "floor": name in found.baselines, "layer": found.layers[place], "cells": row}
            for name, place, row in zip(names, order, cells, strict=True)
        ],
        notes=[{"name": name, "texts": [*found.notes[name]]} for name in names if found.notes.get(name)],
        refused=refused,
        measures=MEASURES,
        pictures=_pictures(found, order),
        ratio=f"{found.images.shape[3]} / {found.images.shape[2]}",
        signs={"signed": bool((found.maps < 0).any()), "positive": bool((found.maps.flatten(1) >= 0).all(1).any())},
        facts={
            "columns": columns,
            "rows": [{"name": name, "floor": name in found.baselines} for name in names],
            "values": [[cell["value"] for cell in row] for row in cells],
            "agreement": _plain(found.agreement[:, order][:, :, order]),
            "metrics": [f"{name} {ARROWS[better]}" for name, better in zip(found.metrics, found.better, strict=True)],
            "shown": _plain(found.values[order][:, :, : len(found.images)]),
        },
    )
    target = path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")
    write_whole(target, text.encode())
    return target


def _order(found: Comparison) -> list[int]:
    """The methods by their mean rank, those without one, the baselines."""
    names = [*found.mean_ranks()]
    names += [name for name in found.methods if name not in names and name not in found.baselines]
    return [found.methods.index(name) for name in [*names, *found.baselines]]


def _columns(found: Comparison, order: Sequence[int]) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """What the table's columns are, and the cells of each method: mean rank, the metrics, what a map costs."""
    ranks = found.mean_ranks()
    columns = [{"name": "mean rank", "better": "lower", "metric": False}]
    by_column = [[_number(ranks.get(name)) for name in found.methods]]
    for name, better in zip(found.metrics, found.better, strict=True):
        of_metric = [row for row in found.rows if row.metric == name]
        ends = _ends(of_metric)
        best = min if better == "lower" else max
        floor = best((row.mean for row in of_metric if row.method in found.baselines and row.images), default=None)
        cells = {row.method: _cell(found, row, ends, floor) for row in of_metric}
        columns.append({"name": name, "better": better, "metric": True, "ends": [_text(end, 2) for end in ends]})
        by_column.append([cells[method] for method in found.methods])
    for name, costs in _costs(found):
        columns.append({"name": name, "better": "lower", "metric": False})
        by_column.append(
            [
                _number(None if one != one or method in found.baselines else one)
                for method, one in zip(found.methods, costs.tolist(), strict=True)
            ]
        )
    return columns, [[cells[place] for cells in by_column] for place in order]


def _costs(found: Comparison) -> Iterator[tuple[str, Tensor]]:
    yield "ms/image", 1000 * found.cost_seconds
    yield "forwards", found.cost_forwards
    yield "backwards", found.cost_backwards
    if not found.memory.isnan().all():
        yield "MiB", found.memory / 2**20


def _number(value: float | None, title: str = "") -> dict[str, Any]:
    return {
        "value": value,
        "text": "–" if value is None else _text(value),
        "title": title,
        "places": None,
        "best": False,
    }


def _text(value: float, digits: int = 3) -> str:
    """So many digits, those that are zero too."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".removesuffix(".")


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """The lowest and the highest end of the intervals."""
    there = [row for row in rows if row.images]
    if not there:
        return 0.0, 1.0
    low, high = min(row.low for row in there), max(row.high for row in there)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _cell(found: Comparison, row: Row, ends: tuple[float, float], floor: float | None) -> dict[str, Any]:
    """A mean and its interval, as numbers and as places between the ends in percent."""
    if not row.images:
        return _number(None, found.refused.get(f"{row.method}, {row.metric}", ""))
    places = [round(100 * (one - ends[0]) / (ends[1] - ends[0]), 1) for one in (row.low, row.mean, row.high)]
    return {
        "value": row.mean,
        "text": _text(row.mean),
        "interval": f"{_text(row.low)} to {_text(row.high)}",
        "title": f"{_text(row.low, 4)} to {_text(row.high, 4)}, {row.images:,} images",
        "places": places,
        "floor": None if floor is None else round(100 * (floor - ends[0]) / (ends[1] - ends[0]), 1),
        "best": row.rank == 1,
    }


def _pictures(found: Comparison, order: Sequence[int]) -> list[dict[str, Any]]:
    maps = overlays(found)
    quality = None if max(found.images.shape[2:]) <= SMALL else QUALITY
    return [
        {
            "picture": data_uri(image, quality=quality),
            "target": target,
            "maps": [data_uri(maps[method, place], quality=quality) for method in order],
        }
        for place, (image, target) in enumerate(zip(found.images, found.targets, strict=False))
    ]


def _plain(values: Tensor) -> Any:
    """Numbers for JSON, of four digits; None where there is none."""

    def cut(one: Any) -> Any:
        return [cut(each) for each in one] if isinstance(one, list) else None if one != one else float(f"{one:.4g}")

    return cut(values.tolist())
