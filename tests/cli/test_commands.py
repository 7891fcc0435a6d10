"""`torchloupe --help`, `methods`, `layers` and `demo`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import Run

import torchloupe as tl
from torchloupe import __version__
from torchloupe.cli import _table, main
from torchloupe_core.errors import StoreError

ASK = """
import sys
from torchloupe.cli import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *{"torch", "numpy", "PIL", "matplotlib"} & set(sys.modules), file=sys.stderr)
"""
SOURCE = [str(Path(__file__).parents[2] / name) for name in ("src", "adapters", "recipes")]


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], ["layers", "-h"], ["--version"], ["explain"]])
def test_help_loads_nothing_and_is_instant(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, env={"PYTHONPATH": ":".join(SOURCE)}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.splitlines()[-1] == "loaded:"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"torchloupe {__version__}\n"


def test_every_command_has_help_with_an_example(run: Run) -> None:
    assert set(main.commands) >= {"explain", "methods", "layers", "demo"}
    for name in main.commands:
        said = run(name, "--help").stdout
        assert f"Example:\n    torchloupe {name}" in said
        assert name in run("--help").stdout


def test_no_command_and_a_wrong_one_exit_2(run: Run) -> None:
    assert run().exit_code == 2
    assert run("explian").exit_code == 2


def test_ctrl_c_anywhere_exits_130_with_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tl, "load", stopped)
    result = run("layers", "demo")
    assert (result.exit_code, result.output) == (130, "torchloupe: stopped\n")


def test_what_libraries_log_is_not_shown() -> None:
    source = """
import logging
from torchloupe.cli import main
main.command("noisy")(lambda: logging.getLogger("some.library").warning("clutter"))
main(["noisy"])
"""
    environment = {"PYTHONPATH": ":".join(SOURCE)}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- methods ----------------------------------------------------------------------------------------------------------


def test_methods_in_a_pipe_are_one_full_line_each(run: Run) -> None:
    lines = run("methods").stdout.splitlines()
    found = tl.methods()
    assert lines[0].split() == ["verb", "name", "backend", "needs", "cost", "paper"]
    assert len(lines) == len(found) + 1
    for line, way in zip(lines[1:], found, strict=True):
        assert line.split()[:3] == [way.verb, way.name, way.backend] and line.endswith(way.paper)


def test_methods_of_one_verb(run: Run) -> None:
    lines = run("methods", "explain").stdout.splitlines()
    assert lines[0].split()[0] == "name"
    assert [line.split()[0] for line in lines[1:]] == [way.name for way in tl.methods("explain")]


def test_methods_as_json(run: Run) -> None:
    rows = [json.loads(line) for line in run("methods", "explain", "--json").stdout.splitlines()]
    assert [row["name"] for row in rows] == [way.name for way in tl.methods("explain")]
    rise = next(row for row in rows if row["name"] == "rise")
    assert rise["options"]["n_masks"] == 4000 and rise["random"] is True and rise["needs"] == []


def test_methods_of_an_unknown_verb(run: Run) -> None:
    result = run("methods", "explian")
    assert result.exit_code == 2 and "did you mean 'explain'?" in result.stderr


def test_a_table_wraps_at_spaces_to_fit_a_terminal() -> None:
    rows = [
        ("name", "cost", "paper"),
        ("captum.occlusion", "one forward and one backward", "Selvaraju et al. 2017"),
        ("b", "", ""),
    ]
    assert _table(rows).splitlines()[1] == "captum.occlusion  one forward and one backward  Selvaraju et al. 2017"
    words = sorted(" ".join(cell for row in rows for cell in row).split())
    for width, reached in ((40, 40), (5, 37)):  # as narrow as its longest words, which stay whole
        narrow = _table(rows, width).splitlines()
        assert max(map(len, narrow)) <= reached and len(narrow) > 4
        assert sorted(" ".join(narrow).split()) == words


def test_methods_on_a_terminal_fit_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, pipe = SimpleNamespace(isatty=lambda: True), SimpleNamespace(isatty=lambda: False)
    monkeypatch.setattr("torchloupe.cli.sys", SimpleNamespace(stdout=terminal, stderr=pipe))
    monkeypatch.setenv("COLUMNS", "100")
    lines = run("methods", "explain").stdout.splitlines()
    assert max(map(len, lines)) <= 100 and "Randomized" not in " ".join(lines)
    monkeypatch.setenv("COLUMNS", "1000")
    assert "Randomized Input Sampling" in run("methods", "explain").stdout


# -- layers -----------------------------------------------------------------------------------------------------------


def layers(run: Run, *arguments: object) -> list[dict[str, Any]]:
    result = run("layers", *arguments, "--no-pretrained", "--json")
    assert result.exit_code == 0 and not result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("name", ["demo", "timm/resnet10t", "timm/vit_tiny_patch16_224"])
def test_layers_are_the_models_own(run: Run, name: str) -> None:
    handle, rows = tl.load(name, pretrained=False), layers(run, name)
    marks = {row["mark"]: row["name"] for row in rows if row["mark"]}
    assert marks == {"features": handle.features, "embedding": handle.embedding}
    rows = [row for row in rows if row["name"] != handle.embedding]
    assert [row["name"] for row in rows] == list(handle.layers)
    for row, layer in zip(rows, handle.layers.values(), strict=True):
        assert (row["kind"], row["channels"], row["calls"]) == (layer.kind, layer.channels, layer.calls)
        assert row["size"] == (layer.size and list(layer.size))
        assert row["layout"] == (layer.layout and layer.layout.order)


def test_layers_as_a_table(run: Run) -> None:
    lines = run("layers", "demo", "--no-pretrained").stdout.splitlines()
    assert lines[0].split() == ["name", "kind", "channels", "size", "layout", "calls", "mark"]
    assert ["layer4", "Block", "128", "8x8", "nchw", "1", "features"] in [line.split() for line in lines]
    assert lines[-2].split() == ["fc.in", "Linear", "128", "-", "vector", "1", "embedding"]


def test_layers_at_another_size(run: Run) -> None:
    rows = layers(run, "demo", "--input-size", "3,32,96")
    assert next(row["size"] for row in rows if row["name"] == "layer4") == [4, 12]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--input-size", "64"], "--input-size is C,H,W as in 3,224,224; got '64'"),
        (["demo", "--input-size", "3,0,64"], "--input-size is C,H,W"),
        (["demo", "--input-size", "1,64,64"], "the model fails on an input of 1x64x64: "),
        (["timm/vit_tiny_patch16_224", "--input-size", "3,96,96"], "Input height (96) doesn't match model (224)"),
        (["nothing"], "no model 'nothing'"),
    ],
)
def test_layers_that_cannot_be_listed(run: Run, arguments: list[str], said: str) -> None:
    result = run("layers", *arguments, "--no-pretrained")
    assert result.exit_code == 2 and not result.stdout
    assert said in result.stderr and len(result.stderr.splitlines()) == 1


# -- receptive-field --------------------------------------------------------------------------------------------------


def test_a_receptive_field_as_a_table(run: Run) -> None:
    lines = run("receptive-field", "demo", "layer2", "--no-pretrained", "--at", "0,5").stdout.splitlines()
    found = tl.receptive_field("demo", "layer2")
    row = dict(zip(lines[0].split(), lines[1].split(), strict=True))
    assert (row["layer"], row["channel"], row["image"]) == ("layer2", "-", "64x64")
    assert [int(row[name]) for name in ("size", "stride", "padding")] == [found.size, found.stride, found.padding]
    assert row["box"] == ",".join(map(str, found.box(0, 5)))
    assert row["cut"] == f"{found.padding},{max(0, -found.box(0, 5)[1])},0,0"


def test_a_receptive_field_as_json(run: Run) -> None:
    asked = ("receptive-field", "demo", "layer3", "--channel", 5, "--input-size", "3,32,96", "--json")
    row = json.loads(run(*asked).stdout)
    field = tl.receptive_field("demo", "layer3", 5, input_size=(3, 32, 96))
    assert (row["layer"], row["channel"], row["image"], row["grid"]) == ("layer3", 5, [32, 96], list(field.grid))
    assert (row["size"], row["stride"], row["padding"], row["measured"]) == (
        field.size,
        field.stride,
        field.padding,
        None,
    )


def test_a_receptive_field_without_gates(run: Run) -> None:
    asked = ("receptive-field", "timm/vit_tiny_patch16_224", "blocks.3", "--no-pretrained", "--json")
    whole, local = (json.loads(run(*asked, *more).stdout) for more in ([], ["--without-gates"]))
    assert (whole["size"], whole["stride"], local["size"], local["stride"]) == (224, 0, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layr3"], "did you mean 'layer3'"),
        (["layer3", "--channel", "900"], "there is no channel 900"),
        (["layer3", "--at", "99,0"], "no position 99,0 in the 8x8 map of 'layer3'"),
        (["layer3", "--at", "9"], "'9' is not ROW,COL, as in 10,3"),
        (["layer3", "--input-size", "1,64,64"], "the model fails on an input of 1x64x64: "),
    ],
)
def test_receptive_fields_that_cannot_be_had(run: Run, arguments: list[str], said: str) -> None:
    result = run("receptive-field", "demo", *arguments)
    assert result.exit_code == 2 and not result.stdout
    assert said in result.stderr


# -- demo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "given"), [([], {"seed": 0}), (["--seed", 3, "--count", 9], {"seed": 3, "count": 9})]
)
def test_demo_prints_where_its_page_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], given: dict[str, int]
) -> None:
    calls: list[tuple[Path, dict[str, int]]] = []

    def write_demo(out: Path, **options: int) -> Path:
        calls.append((out, options))
        return out / "index.html"

    monkeypatch.setitem(sys.modules, "torchloupe._demo", SimpleNamespace(write_demo=write_demo))
    result = run("demo", "--out", tmp_path, *arguments)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == str(tmp_path / "index.html")
    assert calls == [(tmp_path, given)]


def test_demo_that_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_demo(out: Path, **options: int) -> Path:
        raise StoreError(f"cannot write into {out}: Not a directory")

    monkeypatch.setitem(sys.modules, "torchloupe._demo", SimpleNamespace(write_demo=write_demo))
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 2 and result.stderr == f"torchloupe: cannot write into {tmp_path}: Not a directory\n"
