"""What the benchmarks share: work timed in turn, memory in fresh processes, rows beside their goals.

A script is a dictionary of parts; a part yields rows. `run` does the parts whose names begin with what was asked for on
the command line, all on one core. If the environment variable BENCHMARK_ROWS names a file, each row is also appended to
it, as a line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchloupe_core.errors import MissingDependency

ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
Work = Callable[[], object]
Steps = Callable[[int], object]
MADE_FOR = {  # what is imported, and the package to install
    "dattri": "dattri",
    "kronfluence": "kronfluence",
    "lime": "lime",
    "lucent": "torch-lucent",
    "playwright": "playwright",
    "pytorch_grad_cam": "grad-cam",
    "quantus": "quantus",
    "shap": "shap",
    "torchcam": "torchcam",
}


@dataclass(frozen=True)
class Row:
    """One number of a part, and the most it may be (`least`: the least). Without a value the note says why."""

    name: str
    value: float | None
    unit: str = ""
    goal: float | None = None
    least: bool = False
    note: str = ""

    @property
    def kept(self) -> bool | None:
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.least else self.value <= self.goal

    def __str__(self) -> str:
        value = "" if self.value is None else f"{self.value:.3f} {self.unit}"
        aim = "" if self.goal is None else f"goal {'>=' if self.least else '<='} {self.goal:g}"
        kept = {True: "ok", False: "MISSED", None: ""}[self.kept]
        return f"{self.name:72} {value:20} {aim:14} {kept:6} {self.note}".rstrip()


Rows = Iterator[Row]


def asked(doc: str | None, **options: Any) -> argparse.Namespace:
    """The command line: beginnings of names, and options with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of the names of parts")
    parser.add_argument("--apart", help=argparse.SUPPRESS)  # one measurement in this fresh process
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default} unless given")
    return parser.parse_args()


def run(
    parts: Mapping[str, Callable[[], Rows]],
    given: argparse.Namespace,
    apart: Mapping[str, Callable[[], Any]] | None = None,
) -> None:
    """Prints the rows of the parts asked for, or what a measurement of `apart` gives, as JSON."""
    warnings.simplefilter("ignore")
    cores(1)
    if given.apart:
        print(json.dumps((apart or {})[given.apart]()))
        return
    chosen = [name for name in parts if not given.names or any(name.startswith(one) for one in given.names)]
    if not chosen:
        sys.exit(f"nothing begins with {', '.join(given.names)}; there are: {'; '.join(parts)}")
    for part in chosen:
        cores(1)
        begun = time.perf_counter()
        for row in _rows(parts[part]):
            named = replace(row, name=f"{part}: {row.name}" if row.name else part)
            print(named, flush=True)
            _keep(named, section=part, seconds=time.perf_counter() - begun)
            begun = time.perf_counter()


def cores(count: int) -> None:
    """As many threads from now on, on as many cores: one that wanders from core to core is slower."""
    torch.set_num_threads(count)
    if ALLOWED:
        os.sched_setaffinity(0, ALLOWED[-count:])


def _rows(part: Callable[[], Rows]) -> Rows:
    """Those of a part; where a package is missing, that it is."""
    try:
        yield from part()
    except ModuleNotFoundError as error:
        package = MADE_FOR.get((error.name or "").split(".")[0])
        if package is None:
            raise
        yield Row("", None, note=f"{package} is not installed")
    except MissingDependency as error:
        yield Row("", None, note=str(error).split(";")[0])


def _keep(row: Row, **facts: Any) -> None:
    path = os.environ.get("BENCHMARK_ROWS")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            print(json.dumps({**asdict(row), "kept": row.kept, "threads": torch.get_num_threads(), **facts}), file=file)


# -- time -------------------------------------------------------------------------------------------------------------


def in_turn(*works: Work, rounds: int = 5) -> list[list[float]]:
    """Seconds of processor time of each work in each round, after a round that does not count.

    In a round each runs once, in the next the other way around, so that a change of the machine's speed hits all.
    """
    for work in works:
        work()
    return _rounds([functools.partial(seconds, work) for work in works], rounds)


def steps_in_turn(*works: Steps, few: int, many: int, rounds: int = 3) -> list[list[float]]:
    """The same of a single step, from runs of two lengths."""
    for work in works:
        work(few)

    def step(work: Steps) -> float:
        short = seconds(lambda: work(few))
        return (seconds(lambda: work(many)) - short) / (many - few)

    return _rounds([functools.partial(step, work) for work in works], rounds)


def seconds(work: Work) -> float:
    """Of processor time."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def over(ours: Sequence[float], bare: Sequence[float], name: str = "", *, times: float = 1.0, **rest: Any) -> Row:
    """The median over the rounds of `times * ours / bare`; the note says how far it went."""
    ratios = [times * one / other for one, other in zip(ours, bare, strict=True)]
    note = f"({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else "(one round)"
    return Row(name, statistics.median(ratios), note=note, **rest)


def ratio(ours: Work, bare: Work, name: str = "", *, rounds: int = 5, **rest: Any) -> Row:
    """`over` of two works taken in turn."""
    return over(*in_turn(ours, bare, rounds=rounds), name, **rest)


def _rounds(timed: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in timed]
    for turn in range(rounds):
        for place in range(len(timed)) if turn % 2 == 0 else reversed(range(len(timed))):
            found[place].append(timed[place]())
    return found


# -- memory -----------------------------------------------------------------------------------------------------------


def grown(work: Work) -> int:
    """By how many bytes a work raises the process's peak over what it held. Linux only: the peak is reset first."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    work()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


@functools.cache
def in_fresh_process(name: str) -> Any:
    """What a measurement that was given to `run` as one of `apart` comes to in a new process of the same script."""
    command = [sys.executable, sys.argv[0], "--apart", name]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def memory(ours: str, bare: str, name: str = "", *, beside: float = 0, **rest: Any) -> Row:
    """Bytes of one measurement in a fresh process over those of another and `beside`."""
    a, b = in_fresh_process(ours), in_fresh_process(bare)
    return Row(name, a / (b + beside), note=f"{a / 2**20:.1f} MiB against {b / 2**20:.1f} MiB", **rest)
