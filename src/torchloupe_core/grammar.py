"""The grammar of targets, read from left to right. `targets` shows it; each atom writes itself."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator

from torchloupe_core.atoms import CLASS_HEADS, HEADS, Atom, Output, Position, Unit
from torchloupe_core.errors import BadInput, BadTarget
from torchloupe_core.regions import Box, BoxScore, Mask, Region
from torchloupe_core.similarity import Similarity

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
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


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
        name = self.name("a layer, or a word like logit: or region:")
        if quoted or name not in HEADS:
            return self.unit(name)
        if not self.sees(":"):
            raise self.problem(f"expected ':' after {name!r}")
        self.take()
        if name == "similarity":
            return self.similarity()
        label = self.label()
        for kind in CLASS_HEADS:
            if name == kind:
                return Output(kind, label)
        return self.region(label) if name == "region" else self.box_score(label)

    def label(self) -> int | str:
        by_name = self.kind() == "quoted"
        label = self.name("a class name or index")
        return int(label) if label.isdecimal() and not by_name else label

    def region(self, label: int | str) -> Region:
        if not self.sees("@"):
            return Region(label)
        self.take()
        at = self.here()
        if self.kind() == "name" and self.tokens[self.next][1] == "mask":
            self.take()
            with self.pointing(at):
                return Region(label, self.mask())
        edges = self.numbers(4, 4)
        with self.pointing(at):
            return Region(label, Box(*edges))

    def box_score(self, label: int | str) -> BoxScore:
        if not self.sees("@"):
            raise self.problem("expected '@' and a box, top,left,bottom,right")
        self.take()
        at, numbers = self.here(), self.numbers(4, 5)
        with self.pointing(at):
            return BoxScore(label, Box(*numbers[:4]), *numbers[4:])

    def similarity(self) -> Similarity:
        at, kind, reference = self.here(), self.kind(), ""  # type: int, str, str | tuple[float, ...]
        if kind == "vector":
            reference = self.vector()
        else:
            reference = self.name("the path of an image, or an embedding in brackets")
        if kind == "name" and str(reference).startswith("image#"):
            problem = "an image in memory is not in its target's text; give its path or its embedding"
            raise BadTarget.at(self.text, at, problem)
        if not self.sees("@"):
            return Similarity(reference)
        self.take()
        return Similarity(reference, self.name("a layer"))

    def mask(self) -> Mask:
        if self.kind() != "vector":
            raise self.problem("expected '[height,width,runs...]'")
        _, text, at = self.take()
        numbers = text[1:-1].split(",")
        if len(numbers) < 3 or not all(one.strip().isdecimal() for one in numbers):
            raise BadTarget.at(self.text, at, "a mask is its height, its width and its runs, whole numbers")
        height, width, *runs = map(int, numbers)
        return Mask((height, width), tuple(runs))

    def numbers(self, least: int, most: int) -> list[float]:
        """Numbers with commas between them, as those of a box."""
        found: list[float] = []
        while len(found) < least or (len(found) < most and self.sees(",")):
            if found:
                if not self.sees(","):
                    raise self.problem("a box is top,left,bottom,right; expected ','")
                self.take()
            if self.kind() != "name" or not _NUMBER.fullmatch(self.tokens[self.next][1]):
                raise self.problem("a box is top,left,bottom,right; expected a number")
            found.append(float(self.take()[1]))
        return found

    def unit(self, name: str) -> Unit:
        channel, vector, power, position = None, None, 0.0, None
        if self.sees(":"):
            self.take()
            if self.kind() == "vector":
                vector = self.vector()
                power = self.power()
            else:
                channel = self.integer("a channel number")
        if self.sees("@"):
            if channel is None and vector is None:
                raise self.problem("a position belongs to a channel, as in layer:channel@row,column; found it")
            self.take()
            position = self.position()
        return Unit(name, channel, position, vector, power)

    def vector(self) -> tuple[float, ...]:
        _, text, at = self.take()
        try:
            values = tuple(float(value) for value in text[1:-1].split(","))
        except ValueError:
            raise BadTarget.at(self.text, at, "a vector is numbers separated by commas") from None
        if not all(map(math.isfinite, values)):
            raise BadTarget.at(self.text, at, "a vector is finite numbers")
        return values

    def power(self) -> float:
        if not self.sees("^"):
            return 0.0
        self.take()
        try:
            return float(self.name("the power of the cosine"))
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

    def here(self) -> int:
        return self.tokens[self.next][2] if self.next < len(self.tokens) else len(self.text)

    @contextlib.contextmanager
    def pointing(self, at: int) -> Iterator[None]:
        """What is wrong with a box or mask, said with a pointer to where it begins."""
        try:
            yield
        except BadInput as error:
            raise BadTarget.at(self.text, at, str(error)) from None

    def problem(self, expected: str) -> BadTarget:
        if self.next < len(self.tokens):
            _, found, at = self.tokens[self.next]
            return BadTarget.at(self.text, at, f"{expected}, found {found!r}")
        return BadTarget.at(self.text, len(self.text), f"{expected}, found the end")
