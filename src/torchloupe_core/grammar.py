"""The grammar of targets, read from left to right. `targets` shows it; each atom writes itself."""

from __future__ import annotations

import math
import re
from typing import Literal

from torchloupe_core.atoms import HEADS, Atom, Output, Position, Unit
from torchloupe_core.errors import BadTarget

__all__ = ["read"]

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<weight>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*\*
    | (?P<quoted>"(?:[^"\\]|\\.)*")
    | (?P<vector>\[[^\]]*\])
    | (?P<name>[^\s:@+\-*,"\[\]^]+)
    | (?P<sign>[:@+\-,^*])
    )""",
    re.VERBOSE,
)


def read(text: str) -> tuple[tuple[float, Atom], ...]:
    """The weights and atoms of a target's text. Raises `BadTarget` with a pointer into the text."""
    return _Reader(text).terms()


class _Reader:
    """Reads one target text from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.next = text, [], 0  # type: str, list[tuple[str, str, int]], int
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                start = position + len(text[position:]) - len(text[position:].lstrip())
                raise BadTarget.at(text, start, f"{text[start]!r} is not closed or has no place here")
            kind = match.lastgroup or ""
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()

    def terms(self) -> tuple[tuple[float, Atom], ...]:
        terms = [self.term(first=True)]
        while self.next < len(self.tokens):
            terms.append(self.term(first=False))
        return tuple(terms)

    def term(self, *, first: bool) -> tuple[float, Atom]:
        weight = 1.0
        if self.sees("+") or self.sees("-"):
            weight = -1.0 if self.take()[1] == "-" else 1.0
        elif not first:
            raise self.problem("expected '+', '-' or the end; a name with a space or sign in it is quoted")
        if self.kind() == "weight":
            weight *= float(self.take()[1])
        return weight, self.atom()

    def atom(self) -> Atom:
        quoted = self.kind() == "quoted"
        name = self.name("a layer, or logit:, prob: or margin:")
        if not quoted and name in HEADS:
            if not self.sees(":"):
                raise self.problem(f"expected ':' and a class after {name!r}")
            self.take()
            return self.output(name)
        return self.unit(name)

    def output(self, kind: str) -> Output:
        by_name = self.kind() == "quoted"
        label = self.name("a class name or index")
        known: Literal["logit", "prob", "margin"] = (
            "prob" if kind == "prob" else "margin" if kind == "margin" else "logit"
        )
        return Output(known, int(label) if label.isdecimal() and not by_name else label)

    def unit(self, name: str) -> Unit:
        channel, vector, power, position = None, None, 0.0, None
        if self.sees(":"):
            self.take()
            if self.kind() == "vector":
                vector, power = self.vector()
            else:
                channel = self.integer("a channel number")
        if self.sees("@"):
            if channel is None and vector is None:
                raise self.problem("a position belongs to a channel, as in layer:channel@row,column; found it")
            self.take()
            position = self.position()
        return Unit(name, channel, position, vector, power)

    def vector(self) -> tuple[tuple[float, ...], float]:
        _, text, at = self.take()
        try:
            values = tuple(float(value) for value in text[1:-1].split(","))
        except ValueError:
            raise BadTarget.at(self.text, at, "a direction is numbers separated by commas") from None
        if not all(map(math.isfinite, values)):
            raise BadTarget.at(self.text, at, "a direction is finite numbers")
        if not self.sees("^"):
            return values, 0.0
        self.take()
        try:
            return values, float(self.name("the power of the cosine"))
        except ValueError:
            raise self.problem("the power of the cosine is a number; found it before") from None

    def position(self) -> Position:
        if self.kind() == "name" and self.tokens[self.next][1] in ("center", "centre"):
            self.take()
            return "center"
        row = self.integer("a row number or 'center'")
        if not self.sees(","):
            raise self.problem("expected ',' and a column number")
        self.take()
        return row, self.integer("a column number")

    def name(self, what: str) -> str:
        if self.kind() not in ("name", "quoted"):
            raise self.problem(f"expected {what}")
        kind, text, _ = self.take()
        return re.sub(r"\\(.)", r"\1", text[1:-1]) if kind == "quoted" else text

    def integer(self, what: str) -> int:
        if self.kind() != "name" or not self.tokens[self.next][1].isdecimal():
            raise self.problem(f"expected {what}")
        return int(self.take()[1])

    def kind(self) -> str:
        return self.tokens[self.next][0] if self.next < len(self.tokens) else "end"

    def sees(self, sign: str) -> bool:
        return self.next < len(self.tokens) and self.tokens[self.next][:2] == ("sign", sign)

    def take(self) -> tuple[str, str, int]:
        self.next += 1
        return self.tokens[self.next - 1]

    def problem(self, expected: str) -> BadTarget:
        if self.next < len(self.tokens):
            _, found, at = self.tokens[self.next]
            return BadTarget.at(self.text, at, f"{expected}, found {found!r}")
        return BadTarget.at(self.text, len(self.text), f"{expected}, found the end")
