"""Targets on outputs that are not `[N, K]`: class maps, detections, embeddings; closed forms on tiny modules."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import BadInput, BadTarget, LoupeError, NotApplicable, UnknownName
from torchloupe_core.layout import Layout
from torchloupe_core.regions import Box, BoxScore, Mask, Region
from torchloupe_core.similarity import Similarity
from torchloupe_core.spec import Spec

SIZE = (8, 12)
X = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


class Segmenter(nn.Module):
    """Class maps `[N, 3, H, W]`, or `[N, 3, H/2, W/2]`, in a form chosen by `form`."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda maps: maps, stride: int = 1) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2) if stride == 1 else nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.form = nn.Conv2d(4, 3, 1), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(self.up(self.deep(self.down(x).relu()).relu()).relu()))


PLACES = ((0.0, 0.0, 4.0, 5.0), (5.0, 2.0, 12.0, 8.0), (1.0, 1.0, 4.0, 6.0))  # left, top, right, bottom
LABELS = (1, 2, 1)


class Detector(nn.Module):
    """Three detections, whose scores and right edges follow the image; those with a score under `least` are dropped."""

    def __init__(self, least: float = 0.0) -> None:
        super().__init__()
        self.conv, self.fc, self.least = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 6), least

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [self.one(found) for found in self.fc(self.conv(x).relu().mean((2, 3))).sigmoid()]

    def one(self, found: Tensor) -> dict[str, Tensor]:
        scores, boxes = found[:3], torch.tensor(PLACES, dtype=found.dtype)
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:3] + found[3:, None], boxes[:, 3:]], 1)
        kept = scores >= self.least
        return {"boxes": boxes[kept], "labels": torch.tensor(LABELS)[kept], "scores": scores[kept]}


class Embedder(nn.Module):
    """An embedding `[N, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, 2, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return embedding


def handle(kind: type[nn.Module], *given: Any, classes: tuple[str, ...] | None = None, **facts: Any) -> tl.Handle:
    torch.manual_seed(0)
    return tl.Handle(kind(*given).eval(), Spec(input_size=(3, *SIZE), classes=classes, **facts))


def outputs_of(model: tl.Handle, x: Tensor = X) -> Any:
    with torch.no_grad():
        return model.module(x)


# -- the grammar ------------------------------------------------------------------------------------------------------

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


# -- a class over a region --------------------------------------------------------------------------------------------


def test_a_region_is_the_mean_logit_over_it() -> None:
    model = handle(Segmenter, classes=("sky", "sea", "sand"))
    maps = outputs_of(model)
    mask = torch.rand(SIZE, generator=torch.Generator().manual_seed(2)) < 0.3
    rows = torch.zeros(SIZE, dtype=torch.bool)
    rows[2:5, 3:11] = True
    for target, expected in {
        tl.region("sea"): maps[:, 1].mean((1, 2)),
        tl.region(1, mask): maps[:, 1][:, mask].mean(1),
        tl.region(1, mask.numpy()): maps[:, 1][:, mask].mean(1),
        tl.region(2, (2, 3, 5, 11)): maps[:, 2, 2:5, 3:11].mean((1, 2)),
        tl.region(2, rows): maps[:, 2, 2:5, 3:11].mean((1, 2)),
        tl.region(2, (1.6, 2.4, 5.4, 10.6)): maps[:, 2, 2:5, 2:11].mean((1, 2)),  # pixels whose centre is inside
        tl.region(0) - 2 * tl.region("SAND", (0, 0, 1, 1)): maps[:, 0].mean((1, 2)) - 2 * maps[:, 2, 0, 0],
    }.items():
        torch.testing.assert_close(model.score(X, target), expected, msg=lambda m, t=target: f"{t}: {m}")
    each = [tl.region(0), tl.region(1, mask), tl.region(2, (0, 0, 1, 1))]
    expected = torch.stack([maps[0, 0].mean(), maps[1, 1][mask].mean(), maps[2, 2, 0, 0]])
    torch.testing.assert_close(model.score(X, each), expected)


def test_where_the_output_is_smaller_each_position_counts_by_its_share() -> None:
    model = handle(Segmenter, lambda maps: maps, 2)
    maps = outputs_of(model)  # [N, 3, 4, 6], two pixels to a position
    assert maps.shape[2:] == (4, 6)
    torch.testing.assert_close(model.score(X, tl.region(1, (2, 4, 6, 8))), maps[:, 1, 1:3, 2:4].mean((1, 2)))
    torch.testing.assert_close(model.score(X, tl.region(1, (0, 0, 1, 1))), maps[:, 1, 0, 0])  # a quarter of one
    shared = (maps[:, 1, 0, 0] * 4 + maps[:, 1, 0, 1] * 2) / 6  # all of one, half of the next
    torch.testing.assert_close(model.score(X, tl.region(1, (0, 0, 2, 3))), shared)
    own = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(model.score(X, tl.region(1, own)), maps[:, 1][:, own].mean(1))


def test_what_lies_outside_a_region_does_not_matter() -> None:
    model = handle(Segmenter, lambda maps: torch.cat([maps[..., :6], maps[..., 6:] / 0], 3))
    maps = outputs_of(model)
    torch.testing.assert_close(model.score(X, tl.region(1, (0, 0, 8, 6))), maps[:, 1, :, :6].mean((1, 2)))
    with pytest.raises(BadInput, match="NaN or infinity"):
        tl.explain(model, X, target=tl.region(1), method="saliency")


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        (tl.region(3), UnknownName, "3 outputs, 0 to 2"),
        (tl.region("sun"), UnknownName, "no class 'sun'"),
        (tl.region(1, (0, 0, 9, 3)), BadInput, "reaches beyond the image of 8x12"),
        (tl.region(1, (0, 0, 3, 12.5)), BadInput, "reaches beyond the image of 8x12"),
        (tl.region(1, (0, 0, 0.2, 3)), BadInput, "holds no pixel's centre"),
        (tl.region(1, torch.ones(12, 8, dtype=torch.bool)), BadInput, r"mask is \[12, 8\].*image, \[8, 12\]"),
        (tl.logit(1), NotApplicable, r"\[3, 3, 8, 12\].*tl.region\(label\)"),
        (tl.box_score(1, (0, 0, 1, 1)), NotApplicable, "needs a detector.*output="),
        (tl.similarity([1, 2, 3]), NotApplicable, r"\[3, 3, 8, 12\]"),
    ],
)
def test_what_a_segmentation_model_cannot_answer(target: tl.Target, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        handle(Segmenter, classes=("sky", "sea", "sand")).score(X, target)


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda maps: {"out": maps, "aux": -maps}, None),
        (lambda maps: {"aux": -maps, "logits": maps}, None),
        (lambda maps: (maps, -maps), None),
        (lambda maps: {"aux": -maps, "main": maps}, "main"),
        (lambda maps: [-maps, maps], 1),
        (lambda maps: SimpleNamespace(logits=maps), None),
        (lambda maps: SimpleNamespace(masks=maps, loss=None), "masks"),
        (lambda maps: ({"levels": [-maps, maps]}, None), lambda out: out[0]["levels"][1]),
    ],
)
def test_class_maps_are_found_in_every_form_of_output(form: Any, output: Any) -> None:
    model, plain = handle(Segmenter, form, output=output), handle(Segmenter)
    target = tl.region(1, (0, 2, 5, 7))
    torch.testing.assert_close(model.score(X, target), plain.score(X, target))
    assert (model.trace().form, model.trace().outputs) == ("maps", 3)
    for method in ("grad_cam", "saliency"):
        found, expected = (tl.explain(one, X, target=target, method=method).values for one in (model, plain))
        torch.testing.assert_close(found, expected)


def test_maps_of_a_region_equal_hand_written_autograd() -> None:
    model = handle(Segmenter)
    net, mask = model.module, torch.rand(SIZE, generator=torch.Generator().manual_seed(2)) < 0.3
    target = tl.region(2, mask)
    x = X.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(net(x)[:, 2][:, mask].mean(1).sum(), x)
    found = tl.explain(model, X, target=target, method="saliency")
    assert found.per_channel is not None
    torch.testing.assert_close(found.per_channel, gradient)
    torch.testing.assert_close(found.scores, outputs_of(model)[:, 2][:, mask].mean(1))

    features = net.deep(net.down(X).relu()).detach().requires_grad_(True)
    value = net.head(net.up(features.relu()).relu())[:, 2][:, mask].mean(1)
    (gradient,) = torch.autograd.grad(value.sum(), features)
    found = tl.explain(model, X, target=target, method="grad_cam")
    assert found.layer == "deep"
    torch.testing.assert_close(
        found.values, (gradient.mean((2, 3), keepdim=True) * features).sum(1).detach(), atol=1e-7, rtol=1e-4
    )


# -- the score of a box -----------------------------------------------------------------------------------------------


def iou_of(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Of two boxes (left, top, right, bottom), by hand."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return shared / (area(a) + area(b) - shared)


def score_by_hand(found: dict[str, Tensor], label: int, box: tuple[float, ...], least: float) -> float:
    """The largest overlap times score, in a loop; box is (top, left, bottom, right)."""
    top, left, bottom, right = box
    values = [0.0]
    for other, name, score in zip(
        found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
    ):
        overlap = iou_of((left, top, right, bottom), tuple(other))
        if name == label and overlap >= least:
            values.append(overlap * score)
    return max(values)


@pytest.mark.parametrize("least", [0.0, 0.3, 0.5, 0.9])
def test_a_boxs_score_is_the_best_overlap_times_score(least: float) -> None:
    model = handle(Detector)
    found = outputs_of(model)
    boxes = [(0, 0, 5, 4), (2, 5, 8, 12), (1, 1, 6, 5), (0.5, 0.5, 5, 5), (2, 0, 8, 12), (6, 0, 8, 3)]
    values = set()
    for label in (1, 2, 3):
        for box in boxes:
            expected = torch.tensor([score_by_hand(one, label, box, least) for one in found])
            torch.testing.assert_close(model.score(X, tl.box_score(label, box, least)), expected)
            values.add(round(float(expected[0]), 6))
    assert len(values) > (3 if least < 0.5 else 1)


def test_with_no_least_overlap_it_is_the_similarity_of_d_rise() -> None:
    """max over detections of IoU times score times the cosine of the class vectors (Petsiuk et al. 2021), one-hot."""
    model, (top, left, bottom, right) = handle(Detector), (1.0, 2.0, 6.0, 9.0)
    scores = model.score(X, tl.box_score(1, (top, left, bottom, right), iou=0))
    for image, value in zip(outputs_of(model), scores, strict=True):
        similarities = [
            iou_of((left, top, right, bottom), tuple(box.tolist()))
            * float(F.cosine_similarity(F.one_hot(label, 3).float(), F.one_hot(torch.tensor(1), 3).float(), dim=0))
            * float(score)
            for box, label, score in zip(image["boxes"], image["labels"], image["scores"], strict=True)
        ]
        assert float(value) == pytest.approx(max(similarities), rel=1e-6)


def test_its_gradient_is_the_scores_weighted_by_the_overlap() -> None:
    model, box = handle(Detector).to(dtype=torch.float64), (2, 4, 8, 12)
    x = X.double()
    found = tl.explain(model, x, target=tl.box_score(2, box), method="saliency").per_channel
    assert found is not None
    before = outputs_of(model, x)
    for image, *at in ((0, 0, 3, 4), (1, 2, 7, 11), (2, 1, 0, 0)):
        moved = torch.zeros_like(x)
        moved[image][tuple(at)] = 1e-6
        ends = [outputs_of(model, x + sign * moved)[image]["scores"][1] for sign in (1, -1)]
        overlap = iou_of((4, 2, 12, 8), tuple(before[image]["boxes"][1].tolist()))
        assert float(found[image][tuple(at)]) == pytest.approx(overlap * float(ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_at_a_detections_own_box_rounding_changes_nothing() -> None:
    """There the overlap has a kink: a gradient through it would depend on which side of it rounding falls."""
    model = handle(Detector)
    left, top, right, bottom = outputs_of(model)[0]["boxes"][1].tolist()
    found = [
        tl.explain(model, X[:1], target=tl.box_score(2, (top, left, bottom, right * scale)), method="saliency").values
        for scale in (1 - 1e-5, 1, 1 + 1e-5)
    ]
    for one in found:
        torch.testing.assert_close(one, found[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("least", [0.0, 2.0])
def test_where_nothing_fits_it_is_zero_with_a_gradient_of_zero(least: float) -> None:
    model = handle(Detector, least)  # with nothing of that class, or with nothing at all
    target = tl.box_score(3, (0, 0, 5, 5))
    assert model.score(X, target).tolist() == [0, 0, 0]
    x = X.clone().requires_grad_(True)
    with model.borrow(), torch.enable_grad():
        values = model.read(x, model.bind(target, x))
    assert values.requires_grad
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert not gradient.any()
    for method in ("grad_cam", "saliency", "rise"):
        options = {"n_masks": 4} if method == "rise" else {}
        where = {"layer": "conv"} if method == "grad_cam" else {}
        with pytest.raises(BadInput, match="nothing is detected that fits box_score:3@0,0,5,5, in image 0"):
            tl.explain(model, X, target=target, method=method, **where, **options)


def test_of_several_images_the_one_without_a_detection_is_named() -> None:
    model = handle(Detector)
    with pytest.raises(BadInput, match="box_score:3@0,0,5,5, in image 1"):
        tl.explain(
            model, X[:2], target=[tl.box_score(1, (0, 0, 5, 4)), tl.box_score(3, (0, 0, 5, 5))], method="saliency"
        )
    mixed = tl.box_score(1, (0, 0, 5, 4)) - tl.box_score(3, (0, 0, 5, 5))
    assert tl.explain(model, X[:1], target=mixed, method="saliency").values.any()
    inner = tl.channel("conv", 0) - tl.channel("conv", 0)  # zero, but not for want of a detection
    found = tl.explain(model, X[:1], target=tl.box_score(3, (0, 0, 5, 5)) + inner, method="saliency")
    assert found.scores.tolist() == [0]


def test_occlusion_of_a_box_is_the_fall_of_its_score() -> None:
    model, target = handle(Detector, 0.45), tl.box_score(1, (0, 0, 5, 4))
    covered = X.clone()
    covered[:, :, :4, :4] = 0
    found = tl.explain(model, X[:1], target=target, method="occlusion", window=4, stride=4)
    expected = model.score(X, target)[0] - model.score(covered, target)[0]
    torch.testing.assert_close(found.values[0, 0, 0], expected)


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ("logit:1", NotApplicable, r"tl.box_score\(label, \(top, left, bottom, right\)\)"),
        ("region:1", NotApplicable, "the model's output is detections.*output="),
        ("box_score:crab@0,0,1,1", UnknownName, "no class 'crab'"),
        ("box_score:3@0,0,1,1", UnknownName, "3 outputs"),
    ],
)
def test_what_a_detector_cannot_answer(target: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        handle(Detector, classes=("nothing", "fish", "boat")).score(X, target)


def test_detections_of_another_form_are_made_with_output() -> None:
    class Other(Detector):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return {key: torch.stack([one[key] for one in found]) for key in found[0]}

    def listed(out: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return [{key: value[index] for key, value in out.items()} for index in range(len(out["boxes"]))]

    target = tl.box_score(1, (0, 0, 5, 4))
    with pytest.raises(BadInput, match=r"output=, one of \['boxes', 'labels', 'scores'\]"):
        handle(Other).score(X, target)
    torch.testing.assert_close(handle(Other, output=listed).score(X, target), handle(Detector).score(X, target))


# -- similarity -------------------------------------------------------------------------------------------------------

REFERENCE = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(3))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_similarity_is_the_cosine_of_embeddings() -> None:
    model = handle(Embedder)
    net = model.module
    with torch.no_grad():
        maps, other = net.conv(X), net.conv(REFERENCE[None])
        for layer, a, b in (
            (None, net(X), net(REFERENCE[None])),
            ("conv", maps.mean((2, 3)), other.mean((2, 3))),
            ("fc.in", maps.relu().mean((2, 3)), other.relu().mean((2, 3))),
            ("fc", net(X), net(REFERENCE[None])),
        ):
            torch.testing.assert_close(model.score(X, tl.similarity(REFERENCE, layer)), cosine(a, b))
            torch.testing.assert_close(model.score(X, tl.similarity(b[0], layer)), cosine(a, b))
            torch.testing.assert_close(model.score(X, tl.similarity(b, layer) * 2), 2 * cosine(a, b))
    assert float(model.score(REFERENCE, tl.similarity(REFERENCE))) == pytest.approx(1)


def test_a_reference_comes_as_images_do(tmp_path: Path) -> None:
    model = handle(Embedder)
    values = torch.randint(0, 255, (*SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(values.numpy())
    picture.save(tmp_path / "one.png")
    expected = model.score(X, tl.similarity(model.inputs(picture)))
    for given in (picture, values.numpy(), values.permute(2, 0, 1), tmp_path / "one.png", str(tmp_path / "one.png")):
        torch.testing.assert_close(model.score(X, tl.similarity(given)), expected)
    text = str(tl.similarity(tmp_path / "one.png", "fc.in"))
    torch.testing.assert_close(
        tl.explain(model, X, target=text, method="saliency").scores, model.score(X, tl.similarity(picture, "fc.in"))
    )
    picture.save(tmp_path / "two.png")
    for given, says in ((tmp_path, "one image; got 2"), (tmp_path / "no.png", "no such image"), (X, "got 3")):
        with pytest.raises(BadInput, match=says):
            model.score(X, tl.similarity(given))


def test_an_image_in_memory_is_known_by_its_pixels() -> None:
    image = REFERENCE.clone()
    target, same, other = tl.similarity(image), tl.similarity(image.clone()), tl.similarity(image + 1)
    assert target == same and hash(target) == hash(same) and str(target) == str(same)
    assert target != other and str(target) != str(other)
    assert str(target).startswith("similarity:image#") and len(str(target)) == 29
    model = handle(Embedder)
    before = model.score(X, target)
    image.zero_()  # the target holds a copy
    torch.testing.assert_close(model.score(X, target), before)
    assert len({str(tl.similarity(one)) for one in (X[0], X[0].double(), X[0].view(3, 12, 8), X[0].half())}) == 4
    found = tl.explain(model, X[:1], target=target, method="saliency")
    assert found.target == str(target)


def test_once_bound_a_reference_is_its_embedding() -> None:
    model = handle(Embedder)
    (bound,) = model.bind(tl.similarity(REFERENCE), X[:1])
    ((_, atom),) = bound.terms
    assert isinstance(atom, Similarity)
    vector = atom.reference
    torch.testing.assert_close(torch.tensor(vector), outputs_of(model, REFERENCE[None])[0])
    again = tl.target(str(tl.Target(bound.terms)))
    torch.testing.assert_close(model.score(X, again), model.score(X, tl.similarity(REFERENCE)), rtol=0, atol=0)


def test_zero_embeddings_are_similar_to_nothing() -> None:
    model = handle(Embedder)
    with torch.no_grad():
        model.module.fc.weight.zero_()
        model.module.fc.bias.zero_()
    assert model.score(X, tl.similarity([1, 0, 0, 0])).tolist() == [0, 0, 0]
    assert tl.explain(model, X, target=tl.similarity([1, 0, 0, 0]), method="saliency").values.isfinite().all()
    for reference in (REFERENCE, [0, 0, 0, 0]):
        with pytest.raises(BadInput, match="zero everywhere"):
            model.score(X, tl.similarity(reference))


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        (tl.similarity([1, 2, 3]), BadTarget, "has 3 numbers; the model's has 4"),
        (tl.similarity([1, 2, 3, 4], "conv"), BadTarget, "has 4 numbers; the model's has 5"),
        (tl.similarity(REFERENCE, "cnv"), UnknownName, "'conv'"),
        (tl.similarity(torch.zeros(2, 3)), BadInput, r"\[N, C, H, W\]"),
    ],
)
def test_references_that_do_not_fit(target: tl.Target, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        handle(Embedder).score(X, target)


def test_maps_of_a_similarity_equal_hand_written_autograd() -> None:
    model = handle(Embedder)
    net = model.module
    for layer in (None, "fc.in"):
        embed = net if layer is None else lambda x: net.conv(x).relu().mean((2, 3))
        x = X.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cosine(embed(x), embed(REFERENCE[None]).detach()).sum(), x)
        found = tl.explain(model, X, target=tl.similarity(REFERENCE, layer), method="saliency").per_channel
        assert found is not None
        torch.testing.assert_close(found, gradient)
    features = net.conv(X).detach().requires_grad_(True)
    value = cosine(features.mean((2, 3)), net.conv(REFERENCE[None]).mean((2, 3)).detach())
    (gradient,) = torch.autograd.grad(value.sum(), features)
    found = tl.explain(model, X, target=tl.similarity(REFERENCE, "conv"), method="grad_cam", layer="conv").values
    torch.testing.assert_close(found, (gradient.mean((2, 3), keepdim=True) * features).sum(1).detach())


# -- several labels at once -------------------------------------------------------------------------------------------


def test_sigmoid_is_the_probability_of_a_class_by_itself() -> None:
    model = handle(Embedder, classes=("a", "b", "c", "d"))
    torch.testing.assert_close(model.score(X, "sigmoid:b"), 1 / (1 + (-outputs_of(model)[:, 1]).exp()))
    x = X.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.module(x)[:, 1].sigmoid().sum(), x)
    found = tl.explain(model, X, target=tl.sigmoid("b"), method="saliency").per_channel
    assert found is not None
    torch.testing.assert_close(found, gradient)


# -- every method, any caller -----------------------------------------------------------------------------------------

QUESTIONS: dict[str, tuple[Callable[[], tl.Handle], tl.Target]] = {
    "region": (lambda: handle(Segmenter), tl.region(1, (1, 2, 6, 9))),
    "box_score": (lambda: handle(Detector, features="conv"), tl.box_score(1, (0, 0, 5, 4))),
    "similarity": (lambda: handle(Embedder), tl.similarity(REFERENCE)),
    "similarity at a layer": (lambda: handle(Embedder), tl.similarity(REFERENCE, "fc.in")),
}
METHODS: dict[str, dict[str, Any]] = {
    "grad_cam": {},
    "layer_cam": {},
    "eigen_cam": {},
    "score_cam": {},
    "ablation_cam": {},
    "saliency": {},
    "integrated_gradients": {"steps": 8},
    "occlusion": {"window": 4, "stride": 4},
    "rise": {"n_masks": 8, "cells": 3},
    "lime": {"n_samples": 20, "n_segments": 4},
}
PROMISES = (
    "shapes",
    "finite",
    "seeds",
    "batch_size",
    "images_alone",
    "leaves_nothing",
    "errors",
    "interrupts",
    "callers",
    "frozen",
    "train_mode",
    "double",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_every_method_keeps_its_promises_on_these_targets(question: str, method: str) -> None:
    build, target = QUESTIONS[question]
    trial = tl.checks.trial(method, build(), X, target=target, **METHODS[method])
    assert not trial.refused
    for promise in PROMISES:
        tl.checks.checks_of("explain")[promise](trial)


@pytest.mark.parametrize("question", QUESTIONS)
def test_cam_refuses_them(question: str) -> None:
    build, target = QUESTIONS[question]
    with pytest.raises(NotApplicable, match=r"CAM explains sums of logits only, not .*use grad_cam"):
        tl.explain(build(), X, target=target, method="cam")


@pytest.mark.parametrize("kind", [Segmenter, Detector])
def test_without_a_target_the_right_one_is_named(kind: type[nn.Module]) -> None:
    name = "tl.region" if kind is Segmenter else "tl.box_score"
    for ask in (lambda: tl.explain(handle(kind), X, method="saliency"), lambda: handle(kind).predict(X)):
        with pytest.raises(NotApplicable, match=name):
            ask()


# -- the layer to look at ---------------------------------------------------------------------------------------------


def test_in_front_of_class_maps_the_bottleneck_is_looked_at() -> None:
    assert handle(Segmenter).features == "deep"
    assert handle(Segmenter).embedding == "head.in"
    assert handle(Segmenter, features="down").features == "down"
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    assert tl.wrap(flat, input_size=(3, 8, 8)).features == "1"  # not the class maps themselves
    with pytest.raises(UnknownName, match="no layer 'dwn'"):
        _ = handle(Segmenter, features="dwn").features


def test_a_detector_has_no_default_layer_unless_stated() -> None:
    model, target = handle(Detector), tl.box_score(1, (0, 0, 5, 4))
    with pytest.raises(NotApplicable, match="name one of its backbone with layer="):
        tl.explain(model, X, target=target)
    assert tl.explain(model, X, target=target, layer="conv").layer == "conv"
    assert tl.explain(handle(Detector, features="conv"), X, target=target).layer == "conv"


def test_a_layer_stated_to_give_no_map_gives_none() -> None:
    class Crops(nn.Module):
        """A part that sees as many crops as there are images."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.crop = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.crop(self.conv(x)[:, :, 2:6, 2:6]).mean((2, 3))  # type: ignore[no-any-return]

    stated: dict[str, Layout | None] = {"crop": None}
    model = tl.wrap(Crops(), input_size=(3, *SIZE), layouts=stated)
    assert tl.wrap(model.module, input_size=(3, *SIZE)).layers["crop"].spatial
    assert model.layers["crop"].layout is None and model.trace().inputs["crop"].layout is None
    assert model.features == "conv"
    for name in ("crop", "crop.in"):
        with pytest.raises(LoupeError, match="no map"):
            tl.explain(model, X, target=1, layer=name)
