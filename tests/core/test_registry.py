"""Registering, offering, finding and listing methods."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchloupe_core import registry
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.registry import Method
from torchloupe_core.tags import NEEDS


@pytest.fixture(autouse=True)
def kept_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    list(registry.methods())  # or what a test imports first would be forgotten with its tables
    for table in ("_registered", "_offered", "_aliases"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    registry._load_third_parties.cache_clear()
    yield
    registry._load_third_parties.cache_clear()


def test_a_decorated_function_is_found_with_its_facts() -> None:
    @registry.method("explain", "mine.smiles", needs=("gradient",), cost="1 forward", paper="Doe 2026", random=True)
    def smiles(query: object, *, width: int = 3, how: str = "wide") -> None: ...

    found = registry.find("explain", "mine.smiles")
    assert found == Method("explain", "mine.smiles", "mine", smiles, ("gradient",), "1 forward", "Doe 2026", True, True)
    assert found.options == {"width": 3, "how": "wide"}
    found.check_options({"width": 5})
    with pytest.raises(BadInput, match=r"no option 'hight', 'x'; its options: width=3, how='wide'"):
        found.check_options({"hight": 1, "width": 2, "x": 3})


def test_a_method_without_options_says_so() -> None:
    @registry.method("explain", "plain")
    def plain(query: object) -> None: ...

    assert registry.find("explain", "plain").backend == "native"
    with pytest.raises(BadInput, match="its options: none"):
        registry.find("explain", "plain").check_options({"x": 1})


def test_a_second_owner_of_a_name_raises() -> None:
    registry.method("explain", "mine.twice")(_twice)
    registry.method("explain", "mine.twice")(_twice)  # the same module reloaded

    def other() -> None: ...

    other.__module__ = "another.module"
    with pytest.raises(BadInput, match=f"registered by {__name__} already"):
        registry.method("explain", "mine.twice")(other)
    assert registry.find("explain", "mine.twice").run is _twice
    registry.method("other verb", "mine.twice")(other)  # a name is owned for each verb by itself


def _twice() -> None: ...


def test_offered_modules_are_imported_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offered_late.py").write_text(
        "from torchloupe_core.registry import method\n@method('explain', 'late.one')\ndef one(query): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry.offer({("explain", "late.one"): "offered_late"})
    registry.alias("explain", {"one": "late.one"})
    assert "offered_late" not in sys.modules
    assert registry.find("explain", "one").name == "late.one"
    assert "offered_late" in sys.modules
    monkeypatch.delitem(sys.modules, "offered_late")
    assert "late.one" in [entry.name for entry in registry.methods("explain")]


def test_an_unknown_name_lists_the_nearest_of_that_verb() -> None:
    registry.method("explain", "mine.smiles")(_twice)
    registry.method("load", "mine.smile")(_twice)
    registry.alias("explain", {"smiles": "mine.smiles"})
    with pytest.raises(UnknownName) as caught:
        registry.find("explain", "smilse")
    assert "'smiles'" in str(caught.value)
    assert "'mine.smile'" not in str(caught.value)


def test_third_parties_are_found_through_their_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> None:
            registry.method("explain", "third.party")(_twice)

    asked: list[str] = []

    def entry_points(*, group: str) -> list[Entry]:
        asked.append(group)
        return [Entry()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert registry.find("explain", "third.party").backend == "third"
    assert "third.party" in [entry.name for entry in registry.methods("explain")]
    assert asked == ["torchloupe.adapters"]  # once


def test_built_in_methods_state_what_they_are() -> None:
    import torchloupe_adapters

    entries = list(registry.methods())
    known = {(entry.verb, entry.name) for entry in entries}
    assert set(torchloupe_adapters.METHODS) <= known
    for verb, table in torchloupe_adapters.SHORT_NAMES.items():
        for short, full in table.items():
            assert (verb, full) in known
            assert (verb, short) not in known  # a native method would be hidden by the short name
            assert registry.find(verb, short).name == full
    for entry in entries:
        assert set(entry.needs) <= set(NEEDS), entry.name
        assert entry.cost, entry.name
        assert entry.run.__doc__ or "", entry.name
        if entry.verb == "explain":
            assert entry.paper, entry.name
    assert [(entry.verb, entry.name) for entry in entries] == sorted(known)
