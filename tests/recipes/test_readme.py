"""The README's examples run as they stand, and its tables say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torchloupe as tl
from torchloupe_core import registry

README = (Path(__file__).parents[2] / "README.md").read_text()
*EXAMPLES, ADAPTER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_way_to_drop_it_in_has_its_example() -> None:
    assert re.findall(r"^\*\*(\d+)\.", README, re.MULTILINE) == [str(n + 1) for n in range(len(EXAMPLES))]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[number], f"README example {number + 1}", "exec"), {"__name__": "example"})


def test_the_adapter_runs_and_passes_the_contract() -> None:
    try:
        exec(compile(ADAPTER, "README adapter", "exec"), {"__name__": "example"})
        model, batch = tl.load("demo"), tl.demo_scenes(2).images
        result = tl.explain(model, batch, method="mine.gradient_norm", power=2.0)
        assert result.backend == "mine"
        assert (result.values >= 0).all()
        assert result.values.shape == (2, 64, 64)
        tl.checks.check_method("mine.gradient_norm", model, model.inputs(batch))
    finally:
        registry._registered.pop(("explain", "mine.gradient_norm"), None)


def test_the_table_of_methods_is_the_registry() -> None:
    table = README.split("<!-- methods -->\n")[1].split("<!-- /methods -->")[0]
    assert table == tl.methods("explain").markdown()


def test_every_call_in_the_table_of_calls_exists() -> None:
    section = README.split("## What it answers")[1].split("Every call takes")[0]
    for name in re.findall(r"`tl\.(\w+)\(", section):
        assert name in tl.__all__
    for name in re.findall(r"`\.(.*?)`", section):
        for one in re.findall(r"(?:^|\.)(\w+)", re.sub(r"\(.*?\)", "", name)):
            assert hasattr(tl.Handle, one) or hasattr(tl.Attribution, one), one
