"""One page of a comparison that needs nothing else: the numbers, what is to be known, and maps over their images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchloupe_core import plots, registry
from torchloupe_core.comparison import Comparison
from torchloupe_core.images import data_uri
from torchloupe_core.results import write_whole

__all__ = ["write_page"]

TEMPLATE = Path(__file__).parent / "pages" / "comparison.html"


def write_page(found: Comparison, path: Path, title: str | None) -> Path:
    """Writes the page, whole or not at all. Raises `StoreError`."""
    arrows = {"higher": "↑", "lower": "↓"}
    count = found.values.shape[2]
    text: str = registry.find("render", "jinja2.render").run(
        TEMPLATE,
        title=title or f"{len(found) - len(found.baselines)} methods side by side",
        subtitle=f"{count} images, torchloupe {found.versions.get('torchloupe', '')}, seed {found.seed}",
        metrics=[f"{name} {arrows[better]}" for name, better in zip(found.metrics, found.better, strict=True)],
        rows=list(_rows(found)),
        floors=bool(found.baselines),
        notes=[f"{name}: {one}" for name, notes in found.notes.items() for one in notes]
        + [f"{name}: refused, {why}" for name, why in found.refused.items()],
        names=found.methods,
        images=[_image(found, place) for place in range(len(found.images))],
    )
    target = path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")
    write_whole(target, text.encode())
    return target


def _rows(found: Comparison) -> Iterator[dict[str, Any]]:
    by_name = {(row.method, row.metric): row for row in found.rows}
    order = [*found.mean_ranks()]
    order += [name for name in found.methods if name not in order]
    for name in order:
        place = found.methods.index(name)
        rows = [by_name[name, metric] for metric in found.metrics]
        yield {
            "name": name,
            "floor": name in found.baselines,
            "milliseconds": f"{1000 * found.cost_seconds[place].item():.3g}",
            "forwards": f"{found.cost_forwards[place].item():.4g}",
            "cells": [
                {
                    "mean": f"{row.mean:.3g}" if row.images else "–",
                    "interval": f"{row.low:.3g} to {row.high:.3g}" if row.images else "",
                    "best": row.rank == 1,
                }
                for row in rows
            ],
        }


def _image(found: Comparison, place: int) -> dict[str, Any]:
    image = found.images[place]
    maps = [plots.blended(image, one[place], bool((one[place] < 0).any()), 0.6) for one in found.maps]
    return {"picture": data_uri(image), "target": found.targets[place], "maps": [data_uri(one) for one in maps]}
