"""Runs benchmarks one after the other and keeps what they measured beside them, in results.json and RESULTS.md.

    python benchmarks/run.py                                    every script, about three hours
    python benchmarks/run.py explain compare                    these
    python benchmarks/run.py explain:cam images:--scenes=50     what follows a colon is given to the script

`make bench` does the first, `make bench BENCH="explain compare"` the second. A script that is run as a whole has its
section written anew; one that is run in part has the rows replaced that were measured. The rest is kept as it stands,
with the machine and the commit it was measured on. Ends with 1 if a script failed; a goal that is missed is no failure.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import kept_with, page

SHARED = {"measuring", "networks", "results", "run"}
LIBRARIES = ("torch", "torchvision", "timm", "captum")
PEERS = ("grad-cam", "torchcam", "lime", "shap", "torch-lucent", "kronfluence", "dattri", "quantus")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("asked", nargs="*", metavar="script[:argument]", help="every script unless given")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    known = scripts(folder)
    chosen: dict[str, list[str]] = {}
    for word in given.asked or known:
        name, _, argument = word.partition(":")
        if name not in known:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(known)}")
        chosen.setdefault(name, []).extend([argument] if argument else [])
    path, failed = folder / "results.json", []
    state = commit(folder)
    for name, arguments in chosen.items():
        found = measured(folder, name, arguments, state)
        sections = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        sections[name] = {
            "about": about(folder, name),
            "runs": kept_with(found, sections.get(name, {}).get("runs", [])),
        }
        path.write_text(json.dumps(sections, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (folder / "RESULTS.md").write_text(page(sections, machine()), encoding="utf-8")
        failed += [name] if found["error"] else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def scripts(folder: Path) -> list[str]:
    """The names of the benchmarks in a folder."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in SHARED)


def about(folder: Path, name: str) -> str:
    """The first line of a script's docstring."""
    text = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0]


def measured(folder: Path, name: str, arguments: list[str], state: str) -> dict[str, Any]:
    """One run of a script: its rows, and all that is needed to do it again."""
    command = [f"{folder.name}/{name}.py", *arguments]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    load, day, begun = os.getloadavg()[0], datetime.datetime.now(datetime.UTC), time.perf_counter()
    with tempfile.TemporaryDirectory() as kept:
        rows = Path(kept) / "rows"
        environment = {**os.environ, "BENCHMARK_ROWS": str(rows), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        with subprocess.Popen(
            [sys.executable, *command], cwd=folder.parent, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            last = ""
            for line in process.stderr or ():
                print(line, end="", file=sys.stderr, flush=True)
                last = line.strip() or last
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    return {
        "command": f"python {shlex.join(command)}",
        "whole": all(one.startswith("--") for one in arguments),
        "date": f"{day:%Y-%m-%d}",
        "commit": state,
        "machine": machine(),
        "load": round(load, 1),
        "seconds": round(time.perf_counter() - begun),
        "versions": versions(),
        "rows": [json.loads(line) for line in lines],
        "error": f"exit status {process.returncode}: {anonymous(last, folder)}" if process.returncode else None,
    }


def anonymous(text: str, folder: Path) -> str:
    """Without the name of the machine, and with paths cut to their last part."""
    text = re.sub(r"(?<![\w.:/])(?:/[^\s/'\":,]+)+/(?=[^\s/'\":,])", "", text.replace(f"{folder.parent}/", ""))
    return re.sub(rf"\b{re.escape(platform.node())}\b", "this machine", text) if platform.node() else text


def commit(folder: Path) -> str:
    """The one checked out, and whether anything but results was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/RESULTS.md", ":!/benchmarks/results.json")
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return f"commit {name}{' and uncommitted changes' if changed else ''}"


def machine() -> str:
    """The processor, its cores, memory, system and Python."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        system = f"{platform.system()} {platform.release()}"
    return f"{processor}, {os.cpu_count()} cores, {gib:.0f} GiB, {system}, Python {platform.python_version()}"


def versions() -> str:
    """Of what takes part, and which peers are missing."""
    found, missing = [], []
    for package in (*LIBRARIES, *PEERS):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return ", ".join(found) + (f"; not installed: {', '.join(missing)}" if missing else "")


if __name__ == "__main__":
    sys.exit(main())
