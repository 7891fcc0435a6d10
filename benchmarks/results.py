"""What benchmarks measured, as a page: a section for each script, a table for each of its runs that still stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]
HEAD = """# Benchmarks

Written by `make bench` from what the scripts in this folder measured; nothing is typed by hand. Each script says at its
top what its numbers mean. The machine of the last run:

- {machine}
"""


def kept_with(found: Run, before: Sequence[Run]) -> list[Run]:
    """The runs of a script that stand after one more: it takes the place of all, or of its command and its rows."""
    if found["whole"]:
        return [found]
    names = {row["name"] for row in found["rows"]}
    rest = []
    for run in before:
        rows = [row for row in run["rows"] if row["name"] not in names]
        if run["command"] != found["command"] and (rows or run["error"]):
            rest.append({**run, "rows": rows})
    return [*rest, found]


def page(sections: Mapping[str, Any], machine: str) -> str:
    """Markdown."""
    lines = [HEAD.format(machine=machine)]
    for name in sorted(sections):
        lines += [f"## {name}", "", sections[name]["about"], ""]
        for run in sections[name]["runs"]:
            lines += [*facts(run), "", *table(run["rows"])]
    return "\n".join(lines)


def facts(run: Run) -> Iterator[str]:
    threads = sorted({row["threads"] for row in run["rows"]})
    counted = f", threads: {' and '.join(map(str, threads))}" if threads else ""
    yield f"- `{run['command']}`"
    yield f"- {run['date']}, {run['commit']}, {spoken(run['seconds'])}{counted}, load {run['load']} at the start"
    yield f"- {run['machine']}"
    yield f"- {run['versions']}"
    if run["error"]:
        yield f"- **failed**, {cell(run['error'])}"


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if rows:
        yield "| what | measured | goal | kept | |"
        yield "|---|---|---|---|---|"
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:.3f} {row['unit']}".strip()
        goal = "" if row["goal"] is None else f"{'≥' if row['least'] else '≤'} {row['goal']:g}"
        kept = {True: "ok", False: "**missed**", None: ""}[row["kept"]]
        yield f"| {cell(row['name'])} | {value} | {goal} | {kept} | {cell(row['note'])} |"
    if rows:
        yield ""


def spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
