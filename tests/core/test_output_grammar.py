"""The texts of `region`, `box_score`, `similarity` and `sigmoid`, read and written."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchloupe as tl
from torchloupe_core.errors import BadInput, BadTarget
from torchloupe_core.regions import Box, BoxScore, Mask, Region
from torchloupe_core.similarity import Similarity

MASK = torch.tensor([[False, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("sigmoid:dog", tl.sigmoid("dog")),
        ("region:dog", tl.region("dog")),
        ("region:3@0,0,2,4", tl.region(3, (0, 0, 2, 4))),
        ('region:"a b"@0.5,1,2.25,4', tl.region("a b", torch.tensor([0.5, 1, 2.25, 4]))),
        ("region:1@mask[2,3,1,3,2]", tl.region(1, MASK)),
        ("region:1@mask[1,2,0,1,1]", tl.region(1, np.array([[True, False]]))),
        ("box_score:dog@10,20,50,60.5", tl.box_score("dog", (10, 20, 50, 60.5))),
        ("box_score:2@0.00001,0,5,6,0.75", tl.box_score(2, (1e-5, 0, 5, 6), iou=0.75)),
        ("box_score:2@1,2,3,4,0", tl.box_score(2, [1, 2, 3, 4], iou=0)),
        ("similarity:[0.5,-1]", tl.similarity([0.5, -1])),
        ("similarity:[1,2]@fc.in", tl.similarity(np.array([1, 2]), "fc.in")),
        ('similarity:[1,2]@"a b"', tl.similarity(torch.tensor([[1.0, 2.0]]), "a b")),
        ('similarity:"a photo.jpg"@layer4', tl.similarity("a photo.jpg", "layer4")),
        ('similarity:"/x/y.png"', tl.similarity(Path("/x/y.png"))),
        ("region:1-0.5*region:2@0,0,1,1", tl.region(1) - 0.5 * tl.region(2, (0, 0, 1, 1))),
        ("box_score:1@0,0,1,1+layer4:17@3,5", tl.box_score(1, (0, 0, 1, 1)) + tl.neuron("layer4", 17, 3, 5)),
    ],
)
def test_texts_and_constructors_are_the_same(text: str, target: tl.Target) -> None:
    assert str(target) == text
    assert tl.target(text) == target
    assert hash(tl.target(text)) == hash(target)


def test_other_spellings() -> None:
    assert tl.target("similarity:cat.jpg @ fc") == tl.similarity("cat.jpg", "fc")
    assert tl.target(" region : dog @ 1 , 2.0 , 3. , 4 ") == tl.region("dog", (1, 2, 3, 4))
    assert tl.target("box_score:1@1,2,3,4,0.5") == tl.box_score(1, (1, 2, 3, 4))
    for word in ("region", "box_score", "similarity", "sigmoid"):
        assert str(tl.channel(word, 2)) == f'"{word}":2'
        assert tl.target(f'"{word}":2') == tl.channel(word, 2)


def test_whatever_is_built_is_written_so_that_it_reads_back_equal() -> None:
    pick = random.Random(0)
    for _ in range(500):
        top, left = pick.choice([0.0, pick.uniform(0, 9), 10.0 ** -pick.randint(1, 20)]), float(pick.randrange(9))
        box = Box(top, left, top + pick.uniform(0.1, 9), left + pick.choice([1.0, 1e6, 0.3]))
        values = torch.rand(pick.randint(1, 6), pick.randint(1, 6)) < pick.random()
        values[0, 0] |= not values.any()
        mask = Mask.of(values)
        assert torch.equal(mask.covered(), values)
        vector = tuple(pick.choice([0.0, 1.0, pick.gauss(0, 1), 1e-30]) for _ in range(pick.randint(1, 5)))
        label: int | str = pick.choice([3, "3", "a dog", "mask", "region", 'x"@1'])
        for atom in (
            Region(label, pick.choice([None, box, mask])),
            BoxScore(label, box, pick.choice([0.5, 0.0, 1.0, pick.random()])),
            Similarity(pick.choice([vector, str(label)]), pick.choice([None, "fc.in", "a b", "3"])),
        ):
            target = tl.Target(((pick.choice([1.0, -0.5]), atom),))
            assert tl.target(str(target)) == target, str(target)


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("region", 6, "expected ':'"),
        ("region:", 7, "a class name or index"),
        ("region:1@", 9, "expected a number"),
        ("region:1@1,2,3", 14, "expected ','"),
        ("region:1@1,2,3,x", 15, "expected a number"),
        ("region:1@1,2,3,-4", 15, "expected a number"),
        ("region:1@1,2,3,nan", 15, "expected a number"),
        ("region:1@5,2,3,4", 9, "top < bottom"),
        ("region:1@1,2,3,4,5", 16, "expected '+'"),
        ("region:1@mask", 13, "expected '[height,width,runs...]'"),
        ("region:1@mask[2,2]", 13, "whole numbers"),
        ("region:1@mask[2,x,4]", 13, "whole numbers"),
        ("region:1@mask[2,2,1,2]", 9, "add up to its 2x2"),
        ("region:1@mask[2,2,4]", 9, "empty"),
        ("region:1@mask[2,2,1,0,1,2]", 9, "at least 1 long"),
        ("region:1@mask[0,2,0]", 9, "2 pixels"),
        ("box_score:1", 11, "expected '@' and a box"),
        ("box_score:1@1,2,3", 17, "expected ','"),
        ("box_score:1@1,2,3,4,5", 12, "from 0 to 1"),
        ("box_score:1@1,2,3,4,0.5,6", 23, "expected '+'"),
        ("similarity:", 11, "the path of an image"),
        ("similarity:[1,x]", 11, "separated by commas"),
        ("similarity:[1,2]@", 17, "expected a layer"),
        ("similarity:image#0123456789ab", 11, "not in its target's text"),
        ("sigmoid:", 8, "a class name or index"),
    ],
)
def test_a_parse_error_points_at_the_character(text: str, column: int, problem: str) -> None:
    with pytest.raises(BadTarget) as caught:
        tl.target(text)
    first, *_, shown, caret = str(caught.value).split("\n")
    assert problem in first
    assert (shown, caret) == (f"    {text}", " " * (4 + column) + "^")


def test_no_text_makes_the_reader_fail_in_another_way() -> None:
    pick = random.Random(1)
    words = ["region", "box_score", "similarity", "sigmoid", "dog", "mask", "image#0", "1", "2", "9.5", "0"]
    pieces = [*words, ":", "@", ",", "+", "-", "[", "[2,2,1,3]", "[1,2]", " "]
    for _ in range(5000):
        text = "".join(pick.choice(pieces) for _ in range(pick.randint(0, 12)))
        try:
            target = tl.target(text)
        except BadTarget as error:
            assert text in str(error)
        else:
            assert tl.target(str(target)) == target


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: tl.region(1, torch.zeros(4, 4, dtype=torch.bool)), "the mask is empty"),
        (lambda: tl.region(1, torch.ones(4, 4)), "bool mask"),
        (lambda: tl.region(1, torch.ones(1, 4, 4, dtype=torch.bool)), "bool mask"),
        (lambda: tl.region(1, (1, 2, 3)), "four numbers"),
        (lambda: tl.region(1, "dog"), "four numbers"),
        (lambda: tl.region(1, (3, 0, 3, 4)), "top < bottom"),
        (lambda: tl.region(1, (-1, 0, 3, 4)), "0 <= top"),
        (lambda: tl.box_score(1, (0, 4, 3, 4)), "left < right"),
        (lambda: tl.box_score(1, (0, 0, math.inf, 4)), "in pixels"),
        (lambda: tl.box_score(1, None), "four numbers"),  # type: ignore[arg-type]
        (lambda: tl.box_score(1, (0, 0, 1, 1), iou=1.5), "from 0 to 1"),
        (lambda: tl.box_score(1, (0, 0, 1, 1), iou=math.nan), "from 0 to 1"),
        (lambda: tl.similarity([1.0, math.nan]), "finite"),
        (lambda: tl.similarity([]), "finite"),
        (lambda: tl.similarity(["a.jpg", "b.jpg"]), "one image or one embedding"),
        (lambda: tl.similarity(None), "got NoneType"),
    ],
)
def test_what_cannot_be_a_target_is_refused(build: Callable[[], Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        build()
