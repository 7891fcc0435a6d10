"""Targets on class maps and detections: closed forms on tiny modules; every method on each of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from output_models import REFERENCE, SIZE, Detector, Embedder, Segmenter, X, handle, outputs_of
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import BadInput, LoupeError, NotApplicable, UnknownName
from torchloupe_core.layout import Layout

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
