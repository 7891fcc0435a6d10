"""The runner of the benchmarks: what it keeps of scripts that end well, that fail, and that were run before."""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
SHARED = {"measuring", "networks", "results", "run"}
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SHARED)
GOOD = '''"""What a good script measures.

    python benchmarks/good.py
"""
import json, os, sys
print("it is measured")
parts = {"cost": 0.5, "memory": 2.0}
with open(os.environ["BENCHMARK_ROWS"], "a") as file:
    for name, value in parts.items():
        if not sys.argv[1:] or name.startswith(sys.argv[1]):
            facts = {"unit": "F", "goal": 1.0, "least": False, "note": "", "threads": 1, "section": name}
            print(json.dumps({"name": name, "value": value, "kept": value <= 1, "seconds": 1, **facts}), file=file)
'''
BAD = f'''"""What a bad script would measure."""
import sys
sys.exit("{FOLDER}/secret/weights.pt is not on {platform.node()}, nor is /home/me/x/data.bin")
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "good.py").write_text(GOOD)
    (folder / "bad.py").write_text(BAD)
    return folder


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), "--folder", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def section(folder: Path, name: str) -> str:
    text = (folder / "RESULTS.md").read_text()
    return text.split(f"## {name}\n")[1].split("\n## ")[0]


def test_a_script_that_fails_has_its_section_and_the_others_theirs(folder: Path) -> None:
    done = bench(folder)
    assert done.returncode == 1
    assert "it is measured" in done.stdout and "weights.pt" in done.stderr
    good, bad = section(folder, "good"), section(folder, "bad")
    assert "What a good script measures." in good and "`python benchmarks/good.py`" in good
    assert "| cost | 0.500 F | ≤ 1 | ok |  |" in good and "| memory | 2.000 F | ≤ 1 | **missed** |  |" in good
    assert "torch 2" in good and "threads: 1" in good and "no commit" in good and "Python 3" in good
    assert "**failed**, exit status 1: weights.pt is not on this machine, nor is data.bin" in bad


def test_a_section_that_was_not_run_is_kept_as_it_stands(folder: Path) -> None:
    assert bench(folder, "good").returncode == 0
    before = section(folder, "good")
    kept = json.loads((folder / "results.json").read_text())
    kept["good"]["runs"][0] |= {"machine": "an older machine", "commit": "commit 0123456789"}
    (folder / "results.json").write_text(json.dumps(kept))
    assert bench(folder, "bad").returncode == 1
    after = section(folder, "good")
    assert "an older machine" in after and "commit 0123456789" in after
    assert after.split("| what |")[1] == before.split("| what |")[1]


def test_rows_measured_again_take_the_place_of_older_ones(folder: Path) -> None:
    bench(folder, "good")
    assert bench(folder, "good:cost").returncode == 0
    text = section(folder, "good")
    assert text.count("| cost |") == text.count("| memory |") == 1
    assert text.index("| memory |") < text.index("`python benchmarks/good.py cost`") < text.index("| cost |")
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"name": "cost"', '"name": "a row there is no more"'))
    bench(folder, "good")
    text = section(folder, "good")
    assert "good.py cost" not in text and "a row there is no more" not in text and "| memory |" in text


def test_nothing_written_tells_where_it_was_run(folder: Path) -> None:
    bench(folder)
    for name in ("RESULTS.md", "results.json"):
        text = (folder / name).read_text()
        assert not [word for word in text.replace('"', " ").replace("`", " ").split() if word.startswith("/")]
        assert str(folder) not in text and str(ROOT) not in text and str(Path.home()) not in text
        assert platform.node() not in text


def test_an_unknown_script_is_refused_before_any_is_run(folder: Path) -> None:
    done = bench(folder, "good", "gud:cost")
    assert done.returncode == 2 and "'gud'; there are bad, good" in done.stderr
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_is_known_and_says_how_it_is_run(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc and f"python benchmarks/{path.name}" in doc
    assert path.read_text().rstrip().splitlines()[-1].startswith("    run(")


def test_the_runner_knows_every_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import run

    assert run.scripts(FOLDER) == [path.stem for path in SCRIPTS]
    assert {"compare", "embed", "explain", "images", "influence", "lds", "scan", "store", "visualize"} <= {
        *run.scripts(FOLDER)
    }


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import measuring

    monkeypatch.setattr(measuring, "ALLOWED", [])  # else the tests that follow stay on one core
    return measuring


def test_as_many_cores_as_threads(measuring: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(measuring, "ALLOWED", [2, 3, 7])
    monkeypatch.setattr(measuring.os, "sched_setaffinity", lambda *given: chosen.append(given), raising=False)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            measuring.cores(count)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert chosen == [(0, [7]), (0, [3, 7])]


def test_rows_are_printed_and_kept(
    measuring: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = measuring.Row
    monkeypatch.setenv("BENCHMARK_ROWS", str(tmp_path / "rows"))

    def peer() -> object:
        yield row("ours", 2.0, goal=3, least=True)
        raise ModuleNotFoundError(name="lucent.optvis")

    parts = {"cost": lambda: iter([row("", 1.5, "F", 1)]), "cost too": peer, "memory": lambda: iter([row("", 1.0)])}
    measuring.run(parts, argparse.Namespace(names=["cost"], apart=None))
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    missing = "cost too torch-lucent is not installed"
    assert printed == ["cost 1.500 F goal <= 1 MISSED", "cost too: ours 2.000 goal >= 3 MISSED", missing]
    kept = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(one["name"], one["value"], one["kept"]) for one in kept] == [
        ("cost", 1.5, False),
        ("cost too: ours", 2.0, False),
        ("cost too", None, None),
    ]
    assert (
        kept[0]["unit"] == "F" and kept[0]["section"] == "cost" and kept[0]["seconds"] >= 0 and kept[0]["threads"] == 1
    )


def test_other_missing_modules_are_errors(measuring: ModuleType) -> None:
    def broken() -> object:
        raise ModuleNotFoundError(name="torchloupe_core.nothing")
        yield

    with pytest.raises(ModuleNotFoundError):
        measuring.run({"broken": broken}, argparse.Namespace(names=[], apart=None))
    with pytest.raises(SystemExit, match="nothing begins with else; there are: broken"):
        measuring.run({"broken": broken}, argparse.Namespace(names=["else"], apart=None))


def test_works_are_timed_in_turn(measuring: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(measuring.time, "process_time", lambda: clock[0])

    def work(name: str, cost: float) -> object:
        def done(steps: int = 1) -> None:
            order.append(name)
            clock[0] += 5 + cost * steps

        return done

    ours, bare = measuring.in_turn(work("a", 1), work("b", -2), rounds=2)
    assert order == ["a", "b", "a", "b", "b", "a"] and ours == [6, 6] and bare == [3, 3]
    assert measuring.over(ours, bare, times=0.5).value == 1.0
    ours, bare = measuring.steps_in_turn(work("a", 4), work("b", 1), few=2, many=4)
    assert ours == [4, 4, 4] and bare == [1, 1, 1]  # what does not grow with the steps is not theirs


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is reset on Linux only")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grown_is_the_peak_over_what_was_held() -> None:
    """In a process of its own, whose other pages are not moved out meanwhile."""
    program = "before = bytearray(b'1') * 2**26; from measuring import grown\n"
    program += "print(grown(lambda: len(bytearray(b'1') * 2**27)), len(before))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=FOLDER, check=True)
    assert 0.7 * 2**27 <= int(run.stdout.split()[0]) <= 1.5 * 2**27
