"""The exception tree and the form of its messages."""

from __future__ import annotations

import pickle

import pytest

from torchloupe_core import errors
from torchloupe_core.errors import BadTarget, LoupeError, MissingDependency, UnknownName


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("BadInput", ValueError),
        ("BadTarget", ValueError),
        ("MissingDependency", ImportError),
        ("NotApplicable", TypeError),
        ("StoreError", OSError),
        ("UnknownName", LookupError),
    ],
)
def test_each_error_is_ours_and_a_builtin(name: str, parent: type[Exception]) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, LoupeError)
    assert issubclass(kind, parent)
    assert str(kind("what went wrong")) == "what went wrong"
    assert str(pickle.loads(pickle.dumps(kind("what went wrong")))) == "what went wrong"  # across worker processes


def test_all_is_complete() -> None:
    ours = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, LoupeError)}
    assert set(errors.__all__) == ours
    assert errors.__all__ == sorted(errors.__all__)


@pytest.mark.parametrize(
    ("given", "known", "says"),
    [
        ("dgo", ["cat", "dog"], "did you mean 'dog'?"),
        ("DOG", ["cat", "dog"], "did you mean 'dog'?"),
        ("shark", ["great white shark", "cat"], "did you mean 'great white shark'?"),
        ("zzz", ["cat", "dog"], "there are 'cat', 'dog'"),
        ("zzz", [], "there are none"),
        ("zzz", [f"class {n}" for n in range(40)], "there are 40, such as 'class 0', 'class 1'"),
        ("5", range(3), "there are '0', '1', '2'"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(given: str, known: list[str], says: str) -> None:
    message = str(UnknownName.of("class", given, known, "of this model"))
    assert message.startswith(f"no class {given!r} of this model; ")
    assert says in message


def test_suggestions_are_few_and_not_repeated() -> None:
    message = str(UnknownName.of("layer", "layer", [f"layer{n}" for n in range(50)]))
    assert message.count("'layer") == 6  # what was given, and five
    assert str(UnknownName.of("layer", "conv1", ["conv", "Conv"])).count("'conv'") == 1


def test_a_bad_target_points_into_the_text() -> None:
    assert str(BadTarget.at("layer4:x", 7, "expected a number")) == (
        "expected a number, at character 8 of the target:\n    layer4:x\n           ^"
    )


def test_a_missing_dependency_gives_the_pip_line() -> None:
    assert str(MissingDependency.of("captum", None)) == "captum is not installed; pip install captum"
    assert 'pip install "torchloupe[segment]"' in str(MissingDependency.of("opencv-python-headless", "segment"))
