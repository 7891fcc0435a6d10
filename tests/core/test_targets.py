"""The target grammar, its algebra and the value of each kind of target."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchloupe_core import targets as T
from torchloupe_core.errors import BadInput, BadTarget, LoupeError, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.spec import Spec
from torchloupe_core.targets import Output, Target, Unit

CLASSES = ("cat", "dog", "great white shark", "crane", "crane", "12", "Dog house", "logit")


class Net(nn.Module):
    """Two convolutions, one ReLU called twice, pooling, a linear head with a class for each of `CLASSES`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 5, 3, 2, 1)
        self.fc = nn.Linear(5, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def model() -> Handle:
    torch.manual_seed(0)
    return Handle(Net().eval(), Spec(input_size=(3, 8, 12), classes=CLASSES))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def atom(text: str) -> Output | Unit:
    ((weight, one),) = T.parse(text).terms
    assert weight == 1.0
    return one


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("logit:dog", Output("logit", "dog")),
        ("logit:207", Output("logit", 207)),
        ("prob:dog", Output("prob", "dog")),
        ("margin:3", Output("margin", 3)),
        ('logit:"great white shark"', Output("logit", "great white shark")),
        ('logit:"207"', Output("logit", "207")),
        ("layer4", Unit("layer4")),
        ("layer4:17", Unit("layer4", 17)),
        ("layer4.1.conv2:17@3,5", Unit("layer4.1.conv2", 17, (3, 5))),
        ("layer4:17@center", Unit("layer4", 17, "center")),
        ("layer4:17@centre", Unit("layer4", 17, "center")),
        ("layer4:[0.5,-1,2]", Unit("layer4", direction=(0.5, -1.0, 2.0))),
        ("layer4:[1e-3,2]^2", Unit("layer4", direction=(0.001, 2.0), power=2.0)),
        ("layer4:[1,0]^0.5@3,5", Unit("layer4", None, (3, 5), (1.0, 0.0), 0.5)),
        ("0:1", Unit("0", 1)),
        ("0.3.1", Unit("0.3.1")),
        ("relu#2:7", Unit("relu#2", 7)),
        ("fc.in:5", Unit("fc.in", 5)),
        ('"logit":2', Unit("logit", 2)),
        ('"a b":2@0,0', Unit("a b", 2, (0, 0))),
        (r'"a\"\\b"', Unit('a"\\b')),
        ("  layer4 : 17 @ 3 , 5 ", Unit("layer4", 17, (3, 5))),
    ],
)
def test_every_form_of_one_atom(text: str, expected: Output | Unit) -> None:
    assert atom(text) == expected


@pytest.mark.parametrize(
    ("text", "weights", "canonical"),
    [
        ("-layer4:17", [-1], "-layer4:17"),
        ("+layer4:17", [1], "layer4:17"),
        ("0.5*layer4:17+0.5*logit:dog", [0.5, 0.5], "0.5*layer4:17+0.5*logit:dog"),
        ("a:1 - b:2 + 2*c", [1, -1, 2], "a:1-b:2+2*c"),
        ("-.25*a - 1e-2*b", [-0.25, -0.01], "-0.25*a-0.01*b"),
        ("1*a", [1], "a"),
        ("2*0:1", [2], "2*0:1"),  # a number is a weight only before '*'
        ("logit:dog-logit:cat", [1, -1], "logit:dog-logit:cat"),
        ("1e3*a", [1000], "1000*a"),
        ("a:[1,2]^2@centre", [1], "a:[1,2]^2@center"),
    ],
)
def test_weights_signs_and_canonical_text(text: str, weights: list[float], canonical: str) -> None:
    target = T.parse(text)
    assert [weight for weight, _ in target.terms] == weights
    assert str(target) == canonical
    assert T.parse(canonical) == target


def test_whatever_is_built_is_written_so_that_it_reads_back_equal() -> None:
    pick = random.Random(0)
    for _ in range(2000):
        target = Target(tuple((_weight(pick), _random_atom(pick)) for _ in range(pick.randint(1, 4))))
        text = str(target)
        assert T.parse(text) == target, text
        assert str(T.parse(text)) == text


def _weight(pick: random.Random) -> float:
    return pick.choice([1.0, -1.0, 0.5, -2.0, 3.0, pick.uniform(-5, 5), 1e-7, 1e20, 10.0 ** pick.randint(-30, 30)])


def _random_atom(pick: random.Random) -> Output | Unit:
    name = _name(pick)
    match pick.randrange(6):
        case 0:
            return Output(pick.choice(["logit", "prob", "margin"]), pick.randrange(1000))  # type: ignore[arg-type]
        case 1:
            return Output(pick.choice(["logit", "prob", "margin"]), name)  # type: ignore[arg-type]
        case 2:
            return Unit(name)
        case 3:
            return Unit(name, pick.randrange(50))
        case 4:
            return Unit(name, pick.randrange(50), pick.choice(["center", (pick.randrange(9), pick.randrange(9))]))
    vector = tuple(_weight(pick) for _ in range(pick.randint(1, 4)))
    return Unit(name, None, pick.choice([None, "center", (0, 3)]), vector, pick.choice([0.0, 1.0, 2.0, 0.5]))


def _name(pick: random.Random) -> str:
    plain = ["logit", "prob", "margin", "0", "12", "relu#2", "fc.in", "layer4.1.conv2", "center", "1e3", "été", "日本"]
    special = "".join(pick.choice(":@+-*,\"\\[]^# \t'.aZ09_/{}()=!é") for _ in range(pick.randint(1, 6)))
    return pick.choice([*plain, special, special])


def test_digit_only_class_names_and_layers_named_like_outputs_are_quoted() -> None:
    assert str(T.logit("12")) == 'logit:"12"'
    assert str(T.logit(12)) == "logit:12"
    assert str(T.channel("logit", 2)) == '"logit":2'
    assert str(T.logit("logit")) == "logit:logit"  # a class of that name needs no quotes
    assert str(T.channel("0", 2)) == "0:2"
    assert str(T.layer("a b")) == '"a b"'


# -- building ---------------------------------------------------------------------------------------------------------


def test_constructors_equal_their_texts() -> None:
    built = {
        "logit:dog": T.logit("dog"),
        "logit:3": T.logit(np.int64(3)),
        "prob:4": T.prob(torch.tensor(4)),
        "margin:dog": T.margin("dog"),
        "logit:dog-logit:cat": T.margin("dog", "cat"),
        "layer4": T.layer("layer4"),
        "layer4:17": T.channel("layer4", 17),
        "layer4:17@3,5": T.neuron("layer4", 17, 3, 5),
        "layer4:17@center": T.neuron("layer4", 17),
        "layer4:[1,-0.5]": T.direction("layer4", torch.tensor([1, -0.5])),
        "layer4:[1,2]^2": T.direction("layer4", [1, 2], power=2),
    }
    for text, target in built.items():
        assert target == T.parse(text), text
        assert str(target) == text


def test_algebra() -> None:
    a, b = T.channel("a", 1), T.logit("b")
    assert str(0.5 * a + b * 2) == "0.5*a:1+2*logit:b"
    assert str(-(a - b)) == "-a:1+logit:b"
    assert str(a + a) == "a:1+a:1"
    assert len({a, T.parse("a:1"), b}) == 2  # equal targets have equal hashes
    assert (a + b).layers == ("a",)
    assert (a + b).reads_output
    assert not a.reads_output
    for nonsense in (lambda: a * b, lambda: a + 1, lambda: a - "b"):
        with pytest.raises(TypeError):
            nonsense()
    for weight in (math.inf, math.nan):
        with pytest.raises(BadTarget, match="finite"):
            a * weight


def test_interpolate_goes_from_one_end_to_the_other_in_equal_steps() -> None:
    steps = T.interpolate("a:1", T.logit(3), 5)
    assert steps[0] == T.parse("a:1")
    assert steps[-1] == T.logit(3)
    assert [[weight for weight, _ in step.terms] for step in steps[1:-1]] == [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]
    assert len(T.interpolate("a:1", "b:1", 2)) == 2
    with pytest.raises(BadInput, match="at least 2"):
        T.interpolate("a:1", "b:1", 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: T.channel("a", -1),
        lambda: T.logit(-1),
        lambda: T.logit(True),
        lambda: T.neuron("a", 0, -1, 2),
        lambda: T.neuron("a", 0, 1),
        lambda: T.direction("a", [[1.0]]),
        lambda: T.direction("a", [math.nan]),
        lambda: T.as_target(1.5),  # type: ignore[arg-type]
        lambda: T.as_target(None),  # type: ignore[arg-type]
        lambda: T.as_target(True),
    ],
)
def test_what_cannot_be_a_target_is_refused(build: Any) -> None:
    with pytest.raises(BadTarget):
        build()


# -- errors point into the text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("", 0, "expected a layer"),
        ("   ", 3, "expected a layer"),
        ("layer4:", 7, "expected a channel number"),
        ("layer4:x", 7, "found 'x'"),
        ("layer4:17@3", 11, "expected ','"),
        ("layer4:17@3,", 12, "a column number"),
        ("layer4:17@x,3", 10, "a row number"),
        ("layer4:17@3,x", 12, "a column number"),
        ("layer4@3,5", 6, "belongs to a channel"),
        ("logit", 5, "expected ':'"),
        ("logit:", 6, "a class name or index"),
        ("logit:dog house", 10, "quoted"),
        ("a:1 + ", 6, "expected a layer"),
        ("a:1 b:2", 4, "expected '+'"),
        ("a + * b", 4, "expected a layer"),
        ('logit:"dog', 6, "not closed"),
        ("a:[1,2", 2, "not closed"),
        ("a:[1,x]", 2, "numbers separated by commas"),
        ("a:[]", 2, "numbers separated by commas"),
        ("a:[1,nan]", 2, "finite"),
        ("a:[1]^x", 7, "is a number"),
        ("2*", 2, "expected a layer"),
        ("2**a", 2, "expected a layer"),
        ("--a", 1, "expected a layer"),
        ("a:1.5", 2, "a channel number"),
        ("a:-1", 2, "a channel number"),
        ("a]", 1, "no place here"),
        ("layer4:17@3,5,7", 13, "expected '+'"),
        ("a:17@center,3", 11, "expected '+'"),
    ],
)
def test_a_parse_error_points_at_the_character(text: str, column: int, problem: str) -> None:
    with pytest.raises(BadTarget) as caught:
        T.parse(text)
    first, *_, shown, caret = str(caught.value).split("\n")
    assert problem in first
    assert shown == f"    {text}"
    assert caret == " " * (4 + column) + "^"
    assert f"at character {column + 1} " in first


def test_no_text_makes_the_reader_fail_in_another_way() -> None:
    pick = random.Random(1)
    pieces = [
        "logit",
        "prob",
        ":",
        "@",
        "+",
        "-",
        "*",
        ",",
        "^",
        "[1,2]",
        "[",
        '"',
        "\\",
        "a",
        "7",
        "0.5",
        " ",
        "center",
    ]
    for _ in range(5000):
        text = "".join(pick.choice(pieces) for _ in range(pick.randint(0, 8)))
        try:
            target = T.parse(text)
        except BadTarget as error:
            assert text in str(error)
        else:
            assert T.parse(str(target)) == target


# -- against a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("logit:dgo", UnknownName, "'dog'"),
        ("logit:shark", UnknownName, "'great white shark'"),
        ("logit:crane", UnknownName, "2 classes, [3, 4]; give the index"),
        ("logit:8", UnknownName, "8 outputs, 0 to 7"),
        ("conv:1", UnknownName, "'conv1'"),
        ("conv1:4", BadTarget, "channels 0 to 3"),
        ("conv1:0@8,0", BadTarget, "rows 0 to 7 and columns 0 to 11"),
        ("conv1:0@0,12", BadTarget, "rows 0 to 7 and columns 0 to 11"),
        ("conv2:0@4,0", BadTarget, "rows 0 to 3 and columns 0 to 5"),
        ("conv1:[1,2]", BadTarget, "4 numbers"),
        ("relu#3:0", UnknownName, "it runs 2 times"),
        ("relu#0:0", UnknownName, "it runs 2 times"),
        ("fc:8", BadTarget, "channels 0 to 7"),
    ],
)
def test_names_and_numbers_are_checked_against_the_model(
    model: Handle, images: Tensor, text: str, error: type[LoupeError], says: str
) -> None:
    with pytest.raises(error) as caught:
        model.bind(text, images)
    assert says in str(caught.value)


def test_class_names_are_found_exactly_then_without_case(model: Handle, images: Tensor) -> None:
    index = lambda text: model.bind(text, images)[0].logit_weights  # noqa: E731
    assert index("logit:dog") == {1: 1.0}
    assert index("logit:DOG") == {1: 1.0}
    assert index('logit:"great white shark"') == {2: 1.0}
    assert index('logit:"12"') == {5: 1.0}
    assert index('logit:"dog house"') == {6: 1.0}
    assert index("logit:logit") == {7: 1.0}
    assert index("2*logit:dog-logit:1+logit:4") == {1: 1.0, 4: 1.0}
    assert index("prob:dog") is None
    assert index("conv1:1") is None


def test_a_model_without_class_names_asks_for_an_index(images: Tensor) -> None:
    bare = Handle(Net().eval(), Spec(input_size=(3, 8, 12)))
    with pytest.raises(UnknownName, match="give an index, or classes="):
        bare.bind("logit:dog", images)
    assert bare.bind(3, images)[0].logit_weights == {3: 1.0}


@pytest.mark.parametrize("given", [["logit:0"] * 2, [0, 1, 2, 3], torch.tensor([1, 2]), []])
def test_a_wrong_number_of_targets_is_an_error(model: Handle, images: Tensor, given: Any) -> None:
    with pytest.raises(BadInput, match=f"{len(given)} targets for 3 images"):
        model.bind(given, images)


# -- values -----------------------------------------------------------------------------------------------------------


def maps_of(model: Handle, images: Tensor) -> dict[str, Tensor]:
    net = model.module
    with torch.no_grad():
        first = net.conv1(images)
        second = net.conv2(first.relu())
        pooled = second.relu().mean((2, 3))
        return {"conv1": first, "relu#1": first.relu(), "conv2": second, "relu": second.relu(), "fc.in": pooled} | {
            "fc": net.fc(pooled)
        }


def test_the_value_of_each_kind_of_target(model: Handle, images: Tensor) -> None:
    seen = maps_of(model, images)
    logits = seen["fc"]
    others = logits.clone()
    others[:, 1] = -math.inf
    vector = torch.tensor([0.5, -1.0, 2.0, 0.1])
    dot = (seen["conv1"] * vector[:, None, None]).sum(1)  # [N, h, w]
    cosine = dot / ((seen["conv1"].pow(2).sum(1) + 1e-4).sqrt() * (vector.norm() + 1e-4))
    expected = {
        "logit:dog": logits[:, 1],
        "prob:dog": logits.exp()[:, 1] / logits.exp().sum(1),
        "margin:dog": logits[:, 1] - others.max(1).values,
        "conv1:2": seen["conv1"][:, 2].mean((1, 2)),
        "conv1:2@3,5": seen["conv1"][:, 2, 3, 5],
        "conv1:2@center": seen["conv1"][:, 2, 4, 6],
        "conv2:4@center": seen["conv2"][:, 4, 2, 3],
        "conv1": (seen["conv1"] ** 2).mean((1, 2, 3)),
        "relu#1:0": seen["relu#1"][:, 0].mean((1, 2)),
        "relu#2:0": seen["relu"][:, 0].mean((1, 2)),
        "relu:0": seen["relu"][:, 0].mean((1, 2)),
        "relu#2.in:0": seen["conv2"][:, 0].mean((1, 2)),
        "fc.in:3": seen["fc.in"][:, 3],
        "fc:3": logits[:, 3],
        "conv1:[0.5,-1,2,0.1]": dot.mean((1, 2)),
        "conv1:[0.5,-1,2,0.1]^2": (dot * cosine.clamp(min=0.1) ** 2).mean((1, 2)),
        "conv1:[0.5,-1,2,0.1]^2@3,5": (dot * cosine.clamp(min=0.1) ** 2)[:, 3, 5],
        "0.5*logit:dog-2*conv1:2": 0.5 * logits[:, 1] - 2 * seen["conv1"][:, 2].mean((1, 2)),
    }
    for text, value in expected.items():
        torch.testing.assert_close(model.score(images, text), value, msg=lambda m, text=text: f"{text}: {m}")


def test_a_channel_is_its_maximum_in_a_search(model: Handle, images: Tensor) -> None:
    seen = maps_of(model, images)["conv1"]
    torch.testing.assert_close(model.score(images, "conv1:2", reduce="max"), seen[:, 2].amax((1, 2)))
    vector = torch.tensor([0.5, -1.0, 2.0, 0.1])
    dot = (seen * vector[:, None, None]).sum(1)
    torch.testing.assert_close(model.score(images, "conv1:[0.5,-1,2,0.1]", reduce="max"), dot.amax((1, 2)))


def test_a_list_gives_each_image_its_own_target(model: Handle, images: Tensor) -> None:
    mixed = [T.logit("dog"), "conv1:2@3,5", 3]
    seen = maps_of(model, images)
    expected = torch.stack([seen["fc"][0, 1], seen["conv1"][1, 2, 3, 5], seen["fc"][2, 3]])
    torch.testing.assert_close(model.score(images, mixed), expected)
    torch.testing.assert_close(
        model.score(images, torch.tensor([1, 0, 3])), seen["fc"][torch.arange(3), torch.tensor([1, 0, 3])]
    )


def test_margin_of_a_single_output_is_refused() -> None:
    one = Handle(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), Spec(input_size=(3, 2, 2)))
    with pytest.raises(NotApplicable, match="use logit:0"):
        one.score(torch.ones(1, 3, 2, 2), "margin:0")


@pytest.mark.parametrize(("text", "hint"), [("dog", "logit:dog"), ("207", "logit:207")])
def test_a_class_without_logit_is_told_how_to_ask(text: str, hint: str) -> None:
    spec = Spec(input_size=(3, 2, 2), classes=("cat", "dog", "2"))
    model = Handle(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), spec)
    with pytest.raises(UnknownName, match=f"no layer '{text}'.*a class is asked about as {hint}$"):
        model.bind(text, torch.zeros(1, 3, 2, 2))
