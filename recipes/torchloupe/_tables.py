"""What is registered, by whom, and what each needs."""

from __future__ import annotations

import torchloupe_adapters  # noqa: F401  (says where methods and sources live)
from torchloupe_core import registry
from torchloupe_core.registry import Method

__all__ = ["MethodTable", "methods"]

STEPS = {"assign", "recognise", "render"}  # verbs of ours, not of users
COLUMNS = ("verb", "name", "backend", "needs", "cost", "paper")


class MethodTable(list[Method]):
    """Methods, one a row, that print as a table. Rows have `.verb .name .backend .needs .cost .paper`."""

    def __str__(self) -> str:
        return aligned([COLUMNS, *(self._cells(entry) for entry in self)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = ["".join(f"<td>{cell}</td>" for cell in self._cells(entry)) for entry in self]
        head = "".join(f"<th>{column}</th>" for column in COLUMNS)
        return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"

    def markdown(self) -> str:
        """The table as Markdown, for a README."""
        rows = ["| method | backend | needs | cost | paper |", "|---|---|---|---|---|"]
        rows += [f"| `{name}` | " + " | ".join(rest) + " |" for _, name, *rest in map(self._cells, self)]
        return "\n".join(rows) + "\n"

    @staticmethod
    def _cells(entry: Method) -> tuple[str, ...]:
        return (entry.verb, entry.name, entry.backend, ", ".join(entry.needs) or "-", entry.cost, entry.paper)


def methods(verb: str | None = None) -> MethodTable:
    """Every registered way to answer a verb, or all verbs. Lists them without importing the ecosystems."""
    entries = registry.methods(verb)
    return MethodTable(entry for entry in entries if verb is not None or entry.verb not in STEPS)


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
