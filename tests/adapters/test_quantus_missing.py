"""What is said where Quantus is not installed."""

from __future__ import annotations

import sys

import pytest

import torchloupe as tl
from torchloupe_adapters import METHODS
from torchloupe_core.errors import MissingDependency


def test_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quantus", None)
    scenes = tl.demo_scenes(2, seed=0)
    with pytest.raises(MissingDependency, match=r"^quantus is not installed; pip install quantus$"):
        tl.compare("demo", scenes.images, methods=["cam"], metrics=["quantus.sparseness"], progress=False)


def test_every_name_of_the_table_is_a_metric_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quantus", None)
    offered = {name for verb, name in METHODS if verb == "compare" and name.startswith("quantus.")}
    entries = [entry for entry in tl.methods("compare") if entry.backend == "quantus"]
    assert {entry.name for entry in entries} == offered and len(offered) == 28
    for entry in entries:
        assert entry.better in ("higher", "lower") and entry.cost and entry.paper and entry.run.__doc__
