"""Every check of the contract is seen failing on a method that breaks just that promise.

Where the guard around the model would repair the damage, it is taken away first.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from mutants import LITTER, MUTANTS, gradients, honest
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core import handle as handles
from torchloupe_core import registry
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import Method
from torchloupe_core.specimens import SPECIMENS


class Flat(nn.Module):
    """A perceptron: nothing in it has positions."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fc = nn.Linear(3 * 8 * 8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x.flatten(1)).tanh())  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """Rectifies once by module and once by function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)).relu())  # type: ignore[no-any-return]


OTHERS = {"flat": Flat, "mixed": Mixed}


def _model(name: str) -> tl.Handle:
    if name in SPECIMENS:
        return SPECIMENS[name]()[0]
    torch.manual_seed(0)
    return tl.wrap(OTHERS[name]().eval(), input_size=(3, 8, 8))


@contextlib.contextmanager
def _unguarded(module: nn.Module) -> Iterator[None]:
    yield


@pytest.fixture
def swept() -> Iterator[None]:
    """Clears away what mutants leave in the process."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    while LITTER:
        LITTER.pop()()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@pytest.mark.usefixtures("swept")
@pytest.mark.parametrize(("entry", "check", "words", "specimen", "guarded"), MUTANTS)
def test_the_check_fails(
    entry: Method, check: str, words: str, specimen: str, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = _model(specimen)
    trial = tl.checks.trial(entry, handle)
    handle.trace()
    if not guarded:
        monkeypatch.setattr(handles, "borrowed", _unguarded)
    with pytest.raises(AssertionError, match=words):
        tl.checks.checks_of("explain")[check](trial)


def test_every_check_has_a_mutant() -> None:
    assert {one.values[1] for one in MUTANTS} | {"options"} == set(tl.checks.checks_of("explain"))


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (lambda entry, given: None, "an unknown option raises TypeError, which no caller expects"),
        (lambda entry, given: given.pop("no_such_option", None), "an unknown option raises nothing"),
        (lambda entry, given: _refuse(given), "does not list n_masks, cells, p, tolerance, baseline"),
    ],
)
def test_options_fails(refuse: Callable[..., None], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb refuses options, not the method, so here the verb is the mutant."""
    trial = tl.checks.trial("rise", SPECIMENS["plain"]()[0], n_masks=4)
    monkeypatch.setattr(Method, "check_options", refuse)
    with pytest.raises(AssertionError, match=words):
        tl.checks.checks_of("explain")["options"](trial)


def _writes(inputs: Tensor) -> None:
    inputs.mul_(2)


def _detaches(inputs: Tensor) -> None:
    inputs.requires_grad_(False)


def _drops_the_gradient(inputs: Tensor) -> None:
    inputs.grad = None


def _rewrites(inputs: Tensor) -> None:
    inputs.mul_(1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_writes, "the caller's input changed"),
        (_detaches, "requires_grad of the caller's input changed from True to False"),
        (_drops_the_gradient, r"\.grad of the caller's input is another object"),
        (_rewrites, "the version of the caller's input changed"),
    ],
)
def test_leaves_nothing_sees_the_callers_input(
    damage: Callable[[Tensor], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods are handed a copy, so here they are handed the caller's own tensor."""

    def careless(query: Query) -> Map:
        values = honest(query)
        damage(query.inputs)
        return values

    monkeypatch.setattr(tl.Handle, "inputs", lambda self, images: images)
    trial = tl.checks.trial(Method("explain", "mine.careless", "mine", careless), SPECIMENS["plain"]()[0])
    with pytest.raises(AssertionError, match=words):
        tl.checks.checks_of("explain")["leaves_nothing"](trial)


def _refuse(given: dict[str, object]) -> None:
    if "no_such_option" in given:
        raise tl.errors.BadInput("there is no such option")


@pytest.mark.parametrize("specimen", ["plain", "vit_registers"])
def test_an_honest_method_passes_every_check(specimen: str) -> None:
    entry = Method("explain", "mine.honest", "mine", honest, needs=("gradient",))
    tl.checks.check_method(entry, *SPECIMENS[specimen]())


def test_check_method_names_every_broken_promise() -> None:
    def careless(query: Query) -> Map:
        return Map(gradients(query) + torch.rand(()))

    with pytest.raises(AssertionError) as caught:
        tl.checks.check_method(Method("explain", "mine.careless", "mine", careless), SPECIMENS["plain"]()[0])
    message = str(caught.value)
    assert "shapes: mine.careless on plain: values have shape [3, 3, 32, 32]" in message
    assert "seeds: mine.careless on plain: the same seed gives another result" in message


def test_a_method_that_crashes_breaks_the_contract() -> None:
    def crashing(query: Query) -> Map:
        raise KeyError("oops")

    with pytest.raises(AssertionError, match="shapes: KeyError: 'oops'"):
        tl.checks.check_method(Method("explain", "mine.crashing", "mine", crashing), SPECIMENS["plain"]()[0])


def test_the_registry_is_as_it_was() -> None:
    entry = Method("explain", "mine.honest", "mine", honest)
    tl.checks.trial(entry, SPECIMENS["plain"]()[0]).run()
    with pytest.raises(tl.errors.UnknownName):
        registry.find("explain", "mine.honest")
    assert not [one for one in registry.methods("explain") if one.backend in ("mine", "mutant")]


def test_a_method_by_name_is_the_registered_one() -> None:
    tl.checks.check_method("grad_cam", SPECIMENS["plain"]()[0])
    with pytest.raises(tl.errors.UnknownName, match="grad_cam"):
        tl.checks.check_method("grad_camm", SPECIMENS["plain"]()[0])
    with pytest.raises(tl.errors.UnknownName, match="explain"):
        tl.checks.checks_of("explane")


def test_inputs_are_needed_where_the_size_is_not_known() -> None:
    handle = tl.Handle(SPECIMENS["plain"]()[0].module)
    with pytest.raises(tl.errors.BadInput, match="give the checks inputs"):
        tl.checks.check_method("saliency", handle)
    tl.checks.check_method("saliency", handle, torch.randn(2, 3, 24, 32))
