"""Every error torchloupe raises on purpose.

LoupeError
├── UnknownName (LookupError)         a class, layer, method or model that is not there; names the nearest
├── BadTarget (ValueError)            a target text that does not parse; points into the text
├── BadInput (ValueError)             an image, option, checkpoint or model output that cannot be used
├── NotApplicable (TypeError)         a method that would be vacuous or wrong on this model; names what works
├── MissingDependency (ImportError)   an ecosystem that is not installed; gives the pip line
└── StoreError (OSError)              a file or store that cannot be read or written
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BadInput",
    "BadTarget",
    "LoupeError",
    "MissingDependency",
    "NotApplicable",
    "StoreError",
    "UnknownName",
]


class LoupeError(Exception):
    """Parent of every error torchloupe raises on purpose."""


class UnknownName(LoupeError, LookupError):
    """A name that is not there. The message lists the nearest known ones."""

    @classmethod
    def of(cls, kind: str, given: object, known: Iterable[object], where: str = "") -> UnknownName:
        names = [str(name) for name in known]
        place = f" {where}" if where else ""
        return cls(f"no {kind} {str(given)!r}{place}; {_nearest(str(given), names)}")

    def __str__(self) -> str:  # LookupError's children quote their argument; a message is not a key
        return str(self.args[0]) if self.args else ""


class BadTarget(LoupeError, ValueError):
    """A target text that does not parse."""

    @classmethod
    def at(cls, text: str, position: int, problem: str) -> BadTarget:
        return cls(f"{problem}, at character {position + 1} of the target:\n    {text}\n    {' ' * position}^")


class BadInput(LoupeError, ValueError):
    """An image, option, checkpoint or model output that cannot be used."""


class NotApplicable(LoupeError, TypeError):
    """A method that would be vacuous or wrong on this model."""


class MissingDependency(LoupeError, ImportError):
    """An ecosystem that is not installed."""

    @classmethod
    def of(cls, package: str, extra: str | None) -> MissingDependency:
        line = f'pip install "torchloupe[{extra}]"' if extra else f"pip install {package}"
        return cls(f"{package} is not installed; {line}")


class StoreError(LoupeError, OSError):
    """A file or store that cannot be read or written."""


def _nearest(given: str, names: list[str], most: int = 5) -> str:
    if not names:
        return "there are none"
    lowered = {name.lower(): name for name in reversed(names)}
    near = [lowered[match] for match in difflib.get_close_matches(given.lower(), lowered, n=most, cutoff=0.5)]
    near += [name for name in names if given and given.lower() in name.lower() and name not in near]
    if near:
        return "did you mean " + ", ".join(map(repr, near[:most])) + "?"
    if len(names) <= 12:
        return "there are " + ", ".join(map(repr, names))
    return f"there are {len(names)}, such as " + ", ".join(map(repr, names[:most]))
