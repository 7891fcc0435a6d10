"""Methods side by side, judged by metrics over the same images: what `compare` returns."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.results import Result, write_whole

__all__ = ["Comparison", "Row", "bootstrapped"]

RESAMPLES, LEVEL = 1000, 0.95
TINY = 1e-4  # below, the powers of ten are told apart
EQUAL = 1e-5  # of a mean, between means that are one but for rounding


@dataclass(frozen=True)
class Row:
    """One method under one metric: the mean over the images and its interval, from 1000 bootstrap samples of them.

    rank: among the methods, 1 for the best; None for a baseline, and where there is no value. beats: the baselines
    whose interval lies apart on the worse side.
    """

    method: str
    metric: str
    better: str
    mean: float
    low: float
    high: float
    images: int
    rank: int | None
    beats: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """M methods, the baselines after them, under K metrics over N images.

    methods, metrics: their names; baselines: those of the methods that no model has a part in. better: for each metric
    "higher" or "lower". values: `[M, K, N]`, NaN where a metric says nothing of an image. cost_seconds, cost_forwards,
    cost_backwards: of each method, for an image, `[M]`; memory: the most bytes held at once for one image, `[M]`, NaN
    where it was not measured. layers: what each method read, "" for the input. agreement: `[3, M, M]`, the mean over
    images of rank correlation, overlap of the highest tenth, and structural similarity. maps: `[M, S, H, W]`, of the
    first images, which are `images [S, 3, H, W]`; targets: of all.

    refused: methods, and pairs "method, metric", with why. notes: what is to be known of a method. skipped: images that
    could not be read. recommended: the method to use, where that was asked.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_comparison"

    methods: tuple[str, ...]
    baselines: tuple[str, ...]
    metrics: tuple[str, ...]
    better: tuple[str, ...]
    values: Tensor
    cost_seconds: Tensor
    cost_forwards: Tensor
    cost_backwards: Tensor
    memory: Tensor
    layers: tuple[str, ...]
    agreement: Tensor
    maps: Tensor
    images: Tensor
    targets: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    recommended: str = ""

    def __len__(self) -> int:
        return len(self.methods)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One for each method and metric, metric by metric, the best first."""
        return tuple(row for metric in range(len(self.metrics)) for row in self._rows(metric))

    def table(self, *, metrics: Sequence[str] | None = None) -> str:
        """The means with their intervals and ranks as text, a line for each method, the one of best mean rank first."""
        chosen = self._chosen(metrics)
        costs = COSTS if bool((~self.memory.isnan()).any()) else COSTS[:-1]
        head = ["method", *(f"{name} {'↑' if better == 'higher' else '↓'}" for name, better in chosen), *costs]
        lines = [head, *([name, *cells, *self._costs(name)[: len(costs)]] for name, cells in self._cells(chosen))]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        told = [f"recommended: {self.recommended}"] if self.recommended else []
        told += [f"{name}: {note}" for name, notes in self.notes.items() for note in notes]
        told += [f"{name}: refused, {why}" for name, why in self.refused.items()]
        return "\n".join([text, *([""] if told else []), *told]) + "\n"

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line for each method and metric; written to a file if a path is given. Raises `StoreError`."""
        held = io.StringIO()
        writer = csv.DictWriter(
            held, [*self._records[0]] if self._records else ["method", "metric"], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(self._records)
        if path is not None:
            write_whole(Path(path), held.getvalue().encode())
        return held.getvalue()

    def to_pandas(self) -> Any:
        """The same lines as a `pandas.DataFrame`. Raises `MissingDependency`."""
        from torchloupe_core import registry

        return registry.find("table", "pandas.frame").run(self._records)

    def to_latex(self, path: str | os.PathLike[str] | None = None, *, metrics: Sequence[str] | None = None) -> str:
        """The table as a LaTeX tabular with booktabs rules, the best value of each metric bold."""
        chosen = self._chosen(metrics)
        head = [
            "Method",
            *(f"{_tex(name)} $\\{'up' if better == 'higher' else 'down'}arrow$" for name, better in chosen),
        ]
        lines = [
            "\\begin{tabular}{l" + "r" * len(chosen) + "}",
            "\\toprule",
            " & ".join(head) + " \\\\",
            "\\midrule",
        ]
        best = {(row.metric, row.method) for row in self.rows if row.rank == 1}
        for name, cells in self._cells(chosen, ranks=False):
            if name == next(iter(self.baselines), None):
                lines.append("\\midrule")
            marked = [
                f"\\textbf{{{cell}}}" if (metric, name) in best else cell
                for cell, (metric, _) in zip(cells, chosen, strict=True)
            ]
            lines.append(" & ".join([_tex(name), *(cell.replace("±", "$\\pm$") for cell in marked)]) + " \\\\")
        text = "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])
        if path is not None:
            write_whole(Path(path), text.encode())
        return text

    def html(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """One page that fetches nothing: the table, the notes, the maps over the first images. Raises `StoreError`."""
        from torchloupe_core.comparison_page import write_page

        return write_page(self, Path(path), title)

    def mean_ranks(self, metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Each method's mean rank over the metrics that say something of it, the best first; without baselines."""
        names = [name for name, _ in self._chosen(metrics)]
        found: dict[str, list[int]] = {}
        for row in self.rows:
            if row.rank is not None and row.metric in names:
                found.setdefault(row.method, []).append(row.rank)
        means = {name: sum(ranks) / len(ranks) for name, ranks in found.items()}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def row(self, method: str, metric: str) -> Row:
        """One method under one metric."""
        for row in self.rows:
            if (row.method, row.metric) == (method, metric):
                return row
        raise BadInput(
            f"no {method!r} under {metric!r}; there are {', '.join(self.methods)} under {', '.join(self.metrics)}"
        )

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        places = {name: place for place, name in enumerate(self.methods)}
        return [
            {
                "method": row.method,
                "layer": self.layers[places[row.method]],
                "metric": row.metric,
                "better": row.better,
                "mean": row.mean,
                "low": row.low,
                "high": row.high,
                "images": row.images,
                "rank": row.rank,
                "seconds_per_image": self.cost_seconds[places[row.method]].item(),
                "forwards_per_image": self.cost_forwards[places[row.method]].item(),
                "backwards_per_image": self.cost_backwards[places[row.method]].item(),
                "peak_bytes_of_one_image": self.memory[places[row.method]].item(),
            }
            for row in self.rows
        ]

    def _rows(self, metric: int) -> Iterator[Row]:
        sign = 1 if self.better[metric] == "higher" else -1
        found = [(name, *bootstrapped(self.values[place, metric])) for place, name in enumerate(self.methods)]
        ordered = sorted(found, key=lambda one: (one[1] != one[1], -sign * one[1]))
        ranked = {name: sign * mean for name, mean, *_ in ordered if name not in self.baselines and mean == mean}
        floors = {one[0]: one for one in found if one[0] in self.baselines and one[1] == one[1]}
        for name, mean, low, high, count in ordered:
            beaten = tuple(
                base
                for base, (_, _, b_low, b_high, _) in floors.items()
                if (low > b_high if sign > 0 else high < b_low)
            )
            rank = None
            if name in ranked:  # methods that are one share a rank
                rank = 1 + sum(other > ranked[name] + EQUAL * abs(ranked[name]) for other in ranked.values())
            yield Row(name, self.metrics[metric], self.better[metric], mean, low, high, count, rank, beaten)

    def _chosen(self, metrics: Sequence[str] | None) -> list[tuple[str, str]]:
        known = dict(zip(self.metrics, self.better, strict=True))
        for name in metrics or ():
            if name not in known:
                raise BadInput(f"no metric {name!r}; there are {', '.join(known)}")
        return [(name, better) for name, better in known.items() if metrics is None or name in metrics]

    def _cells(self, chosen: Sequence[tuple[str, str]], *, ranks: bool = True) -> Iterator[tuple[str, list[str]]]:
        by_name = {(row.method, row.metric): row for row in self.rows}
        order = [*self.mean_ranks([name for name, _ in chosen])]
        order += [name for name in self.methods if name not in order and name not in self.baselines]
        for name in [*order, *self.baselines]:
            yield name, [_cell(by_name[name, metric], ranks) for metric, _ in chosen]

    def _costs(self, name: str) -> list[str]:
        place = self.methods.index(name)
        memory = self.memory[place].item()
        return [
            f"{1000 * self.cost_seconds[place].item():.3g}",
            f"{self.cost_forwards[place].item():.4g}",
            f"{self.cost_backwards[place].item():.4g}",
            "" if memory != memory else f"{memory / 2**20:.3g}",
        ]


COSTS = ("ms/image", "forwards", "backwards", "MiB")


def bootstrapped(values: Tensor) -> tuple[float, float, float, int]:
    """Mean, lower and upper end of its 95% bootstrap interval, and how many values there are that are not NaN."""
    there = values[~values.isnan()].double()
    if not len(there):
        return float("nan"), float("nan"), float("nan"), 0
    drawn = torch.randint(len(there), (RESAMPLES, len(there)), generator=torch.Generator().manual_seed(0))
    means = there[drawn].mean(1).sort().values
    edge = round((1 - LEVEL) / 2 * RESAMPLES)
    return there.mean().item(), means[edge].item(), means[-edge - 1].item(), len(there)


def _cell(row: Row, rank: bool) -> str:
    if not row.images:
        return "-"
    place = "" if row.rank is None or not rank else f" ({row.rank})"
    half = (row.high - row.low) / 2
    largest = max(abs(row.mean), half)
    if 0 < largest < TINY:
        return f"{row.mean:.2e} ±{half:.1e}{place}"
    digits = max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0
    return f"{row.mean:.{digits}f} ±{half:.{digits}f}{place}"


def _tex(name: str) -> str:
    return name.replace("_", "\\_")
