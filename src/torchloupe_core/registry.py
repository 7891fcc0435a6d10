"""`(verb, name) -> Method`: every way to answer a question, and what each needs and promises, as data.

A method registers itself with a decorator:

    @method("explain", "mine.smiles", needs=("gradient",), cost="1 forward + 1 backward", paper="Doe 2026")
    def smiles(query: Query, *, width: int = 3) -> Map: ...

Its keyword-only parameters are the options users may give. Built-in methods are found through a plain table of strings
(`offer`), third parties' through the entry-point group `torchloupe.adapters`; a module is imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torchloupe_core.errors import BadInput, UnknownName

__all__ = [
    "ENTRY_POINTS",
    "Method",
    "alias",
    "find",
    "method",
    "methods",
    "offer",
    "registered",
    "same_method",
    "synonym",
]

ENTRY_POINTS = "torchloupe.adapters"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """One way to answer a verb.

    needs: what the model must have, in the words of `tags.NEEDS`. cost: in forward and backward passes per image.
    random: whether the result depends on the seed. signed: whether negative values mean evidence against. again: for a
    method that keeps the model's outputs, the map that a result of its gets from other scores, `[N, n]`, of its run.
    shares: what it does with the model that others of the same word do as well, so that a comparison does it once.
    better: for a metric which end is the good one, "higher" or "lower". any_scale: for a metric, whether maps that are
    one up to a positive factor get one answer.
    """

    verb: str
    name: str
    backend: str
    run: Callable[..., Any]
    needs: tuple[str, ...] = ()
    cost: str = ""
    paper: str = ""
    random: bool = False
    signed: bool = True
    again: Callable[..., Any] | None = None
    shares: str = ""
    better: str = ""
    any_scale: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Option names and their defaults."""
        parameters = inspect.signature(self.run).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Raises `BadInput` for an option this method does not have."""
        parameters = inspect.signature(self.run).parameters.values()
        open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        unknown = [name for name in given if name not in self.options]
        if unknown and not open_ended:
            known = ", ".join(f"{name}={default!r}" for name, default in self.options.items()) or "none"
            raise BadInput(f"{self.name} has no option {', '.join(map(repr, unknown))}; its options: {known}")


_registered: dict[tuple[str, str], Method] = {}
_offered: dict[tuple[str, str], str] = {}
_aliases: dict[tuple[str, str], str] = {}
_synonyms: dict[tuple[str, str], str] = {}


def method(
    verb: str,
    name: str,
    *,
    needs: tuple[str, ...] = (),
    cost: str = "",
    paper: str = "",
    random: bool = False,
    signed: bool = True,
    again: Callable[..., Any] | None = None,
    shares: str = "",
    better: str = "",
    any_scale: bool = False,
    backend: str | None = None,
) -> Callable[[F], F]:
    """Registers a function as a way to answer `verb`. A name that has an owner already raises.

    backend: who does the work; without it what the name begins with, as in `captum.lrp`, or `native`.
    """

    def register(function: F) -> F:
        worker = backend or (name.split(".")[0] if "." in name else "native")
        entry = Method(
            verb, name, worker, function, needs, cost, paper, random, signed, again, shares, better, any_scale
        )
        owner = _registered.get((verb, name))
        if owner is not None and owner.run.__module__ != function.__module__:
            raise BadInput(f"{verb} method {name!r} is registered by {owner.run.__module__} already")
        _registered[verb, name] = entry
        return function

    return register


@contextlib.contextmanager
def registered(entry: Method) -> Iterator[None]:
    """Inside, `entry` answers to its name, whether registered or not; afterwards the name is as it was."""
    key = (entry.verb, entry.name)
    before = _registered.get(key)
    _registered[key] = entry
    try:
        yield
    finally:
        if before is None:
            del _registered[key]
        else:
            _registered[key] = before


def offer(table: Mapping[tuple[str, str], str]) -> None:
    """Says which module registers which method, without importing it."""
    _offered.update(table)


def alias(verb: str, table: Mapping[str, str]) -> None:
    """Lets a bare name without a native owner stand for an ecosystem's method."""
    _aliases.update({(verb, short): full for short, full in table.items()})


def synonym(verb: str, table: Mapping[str, str]) -> None:
    """Says which method an ecosystem's is where its own name does not: `{"lime.image": "lime"}`."""
    _synonyms.update({(verb, full): bare for full, bare in table.items()})


def same_method(verb: str, name: str) -> dict[str, str]:
    """The same method in each backend that has it, `{backend: name}`, the native one first.

    `grad_cam` is `captum.grad_cam`, `grad_cam.grad_cam` and `torchcam.grad_cam` as well. By name: whether they give the
    same map is for a comparison to say. Raises `UnknownName`.
    """
    wanted = _without_backend(find(verb, name))
    found = {entry.backend: entry.name for entry in methods(verb) if _without_backend(entry) == wanted}
    return dict(sorted(found.items(), key=lambda pair: (pair[0] != "native", pair[0])))


def _without_backend(entry: Method) -> str:
    return _synonyms.get((entry.verb, entry.name), entry.name.removeprefix(f"{entry.backend}."))


def find(verb: str, name: str) -> Method:
    """The method of that name. Raises `UnknownName` with the nearest names."""
    full = _aliases.get((verb, name), name)
    if (verb, full) not in _registered and (verb, full) in _offered:
        importlib.import_module(_offered[verb, full])
    if (verb, full) not in _registered:
        _load_third_parties()
    if (verb, full) not in _registered:
        raise UnknownName.of(f"{verb} method", name, [*_names(verb), *(short for v, short in _aliases if v == verb)])
    return _registered[verb, full]


def methods(verb: str | None = None) -> Iterator[Method]:
    """Every method known, of one verb or all, by name."""
    for module in dict.fromkeys(_offered.values()):
        importlib.import_module(module)
    _load_third_parties()
    for (known, _), entry in sorted(_registered.items()):
        if verb in (None, known):
            yield entry


@functools.cache
def _load_third_parties() -> None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()


def _names(verb: str) -> list[str]:
    return sorted({name for known, name in (*_registered, *_offered) if known == verb})
