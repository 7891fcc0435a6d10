"""torchvision's detection and segmentation models, with random weights on small images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import detection as D
from torchvision.models import segmentation as S
from torchvision.ops import box_iou

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.handle import Reading

SIZE = (48, 64)
X = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
CLASSES = 4

RANDOM: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
SMALL = {"min_size": 48, "max_size": 96}
TWO_STAGES = {**RANDOM, **SMALL, "box_score_thresh": 0.0, "box_detections_per_img": 6}
ONE_STAGE = {**RANDOM, "score_thresh": 0.0, "detections_per_img": 20}

DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "fasterrcnn_resnet50_fpn": lambda: D.fasterrcnn_resnet50_fpn(**TWO_STAGES),
    "fasterrcnn_mobilenet_v3_large_320_fpn": lambda: D.fasterrcnn_mobilenet_v3_large_320_fpn(**TWO_STAGES),
    "maskrcnn_resnet50_fpn": lambda: D.maskrcnn_resnet50_fpn(
        **{**TWO_STAGES, "box_detections_per_img": 1, "rpn_post_nms_top_n_test": 2}
    ),
    "keypointrcnn_resnet50_fpn": lambda: D.keypointrcnn_resnet50_fpn(
        **{**TWO_STAGES, "num_classes": 2, "box_detections_per_img": 2}
    ),
    "retinanet_resnet50_fpn": lambda: D.retinanet_resnet50_fpn(**ONE_STAGE, **SMALL),
    "fcos_resnet50_fpn": lambda: D.fcos_resnet50_fpn(**ONE_STAGE, **SMALL),
    "ssd300_vgg16": lambda: D.ssd300_vgg16(**ONE_STAGE),
    "ssdlite320_mobilenet_v3_large": lambda: D.ssdlite320_mobilenet_v3_large(**ONE_STAGE),
}
FEATURES = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": "backbone.body.16",
    "ssd300_vgg16": "backbone.features",
    "ssdlite320_mobilenet_v3_large": "backbone.features.0",
}
SEGMENTERS: dict[str, Callable[[], nn.Module]] = {
    "fcn_resnet50": lambda: S.fcn_resnet50(**RANDOM, aux_loss=True),
    "deeplabv3_mobilenet_v3_large": lambda: S.deeplabv3_mobilenet_v3_large(**RANDOM),
    "lraspp_mobilenet_v3_large": lambda: S.lraspp_mobilenet_v3_large(**RANDOM),
}


@functools.cache
def built(name: str) -> tl.Handle:
    """A frozen model, each layer scaled so that it has unit spread on `X`: else scores hardly depend on the image."""
    torch.manual_seed(0)
    module = {**DETECTORS, **SEGMENTERS}[name]().eval().requires_grad_(False)

    def scaled(part: nn.Module, _: Any, output: Tensor) -> Tensor:
        hooks[part].remove()  # a head that several levels share is scaled at the first
        spread = output.std().clamp(min=1e-9) * (1 if part not in edges else 5)
        for parameter in part.parameters():
            parameter.div_(spread)
        return output / spread

    heads = dict(module.named_modules()).items() if not name.startswith("fcos") else ()
    edges = {part for path, part in heads if "bbox" in path or "regression" in path}  # boxes stay near their anchors
    parts = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    hooks = {part: part.register_forward_hook(scaled) for part in parts}
    module(X)
    return tl.wrap(module)


def detected(name: str, x: Tensor = X) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        found: list[dict[str, Tensor]] = built(name).module(list(x))
    return found


def own_box(found: dict[str, Tensor]) -> tuple[int, tuple[float, float, float, float]]:
    """The label and (top, left, bottom, right) of the best detection of some size."""
    for box, label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True):
        left, top, right, bottom = box
        if bottom > top + 4 and right > left + 4:
            return label, (top, left, bottom, right)
    raise AssertionError("all detections are tiny")


def by_hand(found: dict[str, Tensor], label: int, box: tuple[float, ...], least: float = 0.5) -> Tensor:
    """The largest overlap times score; box is (top, left, bottom, right), torchvision's are (left, top, ...)."""
    top, left, bottom, right = box
    overlap = box_iou(found["boxes"], found["boxes"].new_tensor([[left, top, right, bottom]]))[:, 0]
    overlap, fits = overlap.detach(), (found["labels"] == label) & (overlap >= least)
    return (overlap * found["scores"])[fits].max() if fits.any() else found["scores"].sum() * 0


def near(box: tuple[float, ...]) -> tuple[float, ...]:
    """A box that overlaps another by more than half, with no edge in common."""
    top, left, bottom, right = box
    height, width = bottom - top, right - left
    return top + 0.1 * height, left + 0.07 * width, bottom + 0.05 * height, right + 0.08 * width


# -- detection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_the_score_of_a_box_is_that_of_torchvisions_detections(name: str) -> None:
    model, found = built(name), detected(name)
    labels, boxes = zip(*map(own_box, found), strict=True)
    own = [tl.box_score(label, box) for label, box in zip(labels, boxes, strict=True)]
    for score, one, target in zip(model.score(X, own), found, own, strict=True):  # each image its own box
        assert any(torch.isclose(score, other, rtol=1e-4) for other in one["scores"]), target
        assert tl.target(str(target)) == target
    with model.watch(shape=(3, *SIZE)) as watch:
        reading = Reading(model, watch, watch(X))
    for label in range(2 if name.startswith("keypoint") else CLASSES):
        for box in (boxes[0], near(boxes[0]), (0.0, 0.0, 48.0, 64.0), (10.0, 20.0, 40.0, 60.0)):
            for least in (0.0, 0.5):
                (bound,) = model.bind(tl.box_score(label, box, least), X[:1])
                expected = torch.stack([by_hand(one, label, box, least) for one in reading.detections()])
                torch.testing.assert_close(bound.read(reading), expected)


@pytest.mark.parametrize("name", DETECTORS)
def test_maps_equal_hand_written_autograd(name: str) -> None:
    model, image, module = built(name), X[:1], built(name).module
    label, own = own_box(detected(name, image)[0])
    for box in (own, near(own)):
        x = image.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(by_hand(module(x)[0], label, box), x)
        shares = tl.explain(model, image, target=tl.box_score(label, box), method="saliency").per_channel
        assert shares is not None and gradient.any()
        torch.testing.assert_close(shares, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))

    target, layer = tl.box_score(label, near(own)), FEATURES.get(name, "backbone.body.layer4")
    kept: list[Tensor] = []

    def leaf(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_(True))
        return kept[0]

    hook = module.get_submodule(layer).register_forward_hook(leaf)
    try:
        value = by_hand(module(image)[0], label, near(own))
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(value, kept[0])
    found = tl.explain(model, image, target=target, method="grad_cam")
    expected = (gradient.mean((2, 3), keepdim=True) * kept[0].detach()).sum(1)
    assert found.layer == layer == model.features_at((3, *SIZE))
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert found.values.any()


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_the_gradient_is_the_slope_of_the_score(name: str) -> None:
    """Of one-stage models: the proposals of two-stage ones move with the image, and torchvision detaches them."""
    model, x = built(name).to(dtype=torch.float64), X[:1].double()
    label, own = own_box(scores_of(model, x))
    shares = tl.explain(model, x, target=tl.box_score(label, own), method="saliency").per_channel
    assert shares is not None
    for flat in shares.abs().flatten().topk(3).indices.tolist():
        moved = torch.zeros_like(x)
        moved.view(-1)[flat] = 1e-6
        high, low = (scores_of(model, one)["scores"] for one in (x + moved, x - moved))
        at = int((scores_of(model, x)["scores"] - model.score(x, tl.box_score(label, own))).abs().argmin())
        assert float(shares.view(-1)[flat]) == pytest.approx(float(high[at] - low[at]) / 2e-6, rel=1e-3)


def scores_of(model: tl.Handle, x: Tensor) -> dict[str, Tensor]:
    with model.borrow():
        found: dict[str, Tensor] = model.module(x)[0]
    return found


def test_pytorch_grad_cams_target_has_the_same_gradient() -> None:
    """Its value is overlap plus score; with the overlap held, at the detection's own box, they differ by the 1."""
    model, module = built("retinanet_resnet50_fpn"), built("retinanet_resnet50_fpn").module
    label, own = own_box(detected("retinanet_resnet50_fpn")[0])
    x = X[:1].clone().requires_grad_(True)
    found = module(x)[0]
    overlap = box_iou(found["boxes"], found["boxes"].new_tensor([[own[1], own[0], own[3], own[2]]]))[:, 0].detach()
    best = int(overlap.argmax())
    value = overlap[best] + found["scores"][best]
    torch.testing.assert_close(model.score(X[:1], tl.box_score(label, own)), value.detach()[None] - 1)
    (gradient,) = torch.autograd.grad(value, x)
    shares = tl.explain(model, X[:1], target=tl.box_score(label, own), method="saliency").per_channel
    assert shares is not None
    torch.testing.assert_close(shares, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_methods_that_perturb_answer_and_leave_nothing(name: str) -> None:
    model = built(name)
    model.module.train()
    targets = [tl.box_score(*own_box(one), iou=0) for one in detected_in_eval(model)]
    before = Snapshot(model.module, X)
    options: dict[str, dict[str, Any]] = {
        "rise": {"n_masks": 8},
        "occlusion": {"window": 32, "stride": 32},
        "layer_cam": {},
        "integrated_gradients": {"steps": 3},
    }
    for method, given in options.items():
        found = tl.explain(model, X, target=targets, method=method, **given)
        alone = tl.explain(model, X[1:], target=targets[1], method=method, **given)
        assert found.values.any()
        torch.testing.assert_close(
            found.values[1:], alone.values, rtol=1e-3, atol=1e-4 * float(alone.values.abs().max())
        )
    assert before.differences() == []
    model.module.eval()


def detected_in_eval(model: tl.Handle) -> list[dict[str, Tensor]]:
    with model.borrow():
        found: list[dict[str, Tensor]] = model.module(X)
    return found


def test_what_sees_crops_gives_no_map_of_the_image() -> None:
    """With one detection an image the mask head sees as many crops as there are images; proposals are two as well."""
    model = built("maskrcnn_resnet50_fpn")
    layers = model.trace((3, *SIZE)).layers
    crops = [name for name in layers if name.startswith("roi_heads")]
    assert len(crops) > 10
    assert [name for name in ("rpn", *crops) if layers[name].layout is not None] == []
    assert layers["backbone.fpn.layer_blocks.0.0"].spatial and layers["rpn.head.cls_logits"].layout is not None
    target = tl.box_score(*own_box(detected("maskrcnn_resnet50_fpn")[0]))
    for name in ("roi_heads.mask_head.0.0", "roi_heads.box_head.fc6", "rpn"):
        with pytest.raises(NotApplicable, match=r"cannot say where; a spatial one is 'backbone.body.layer4'"):
            tl.explain(model, X[:1], target=target, layer=name)


@pytest.mark.parametrize("name", [name for name in DETECTORS if name.startswith(("fcos", "retina"))])
def test_a_question_a_detector_cannot_answer_names_the_one_it_can(name: str) -> None:
    model = built(name)
    with pytest.raises(NotApplicable, match=r"tl.box_score"):
        model.predict(X)
    with pytest.raises(NotApplicable, match=r"tl.box_score"):
        tl.explain(model, X, method="saliency")
    with pytest.raises(NotApplicable, match=r"sums of logits only.*grad_cam"):
        tl.explain(model, X, target=tl.box_score(1, (0, 0, 9, 9)), method="cam")
    with pytest.raises(BadInput, match=r"nothing is detected that fits box_score:1@0,0,0.5,0.5, in image 0"):
        tl.explain(model, X, target=tl.box_score(1, (0, 0, 0.5, 0.5)), method="saliency")


def test_detectors_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any, **options: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", failing)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", failing)
    model = tl.load("torchvision/ssdlite320_mobilenet_v3_large", pretrained=False)  # nor its backbone's are fetched
    assert model.spec.input_size == (3, 320, 320) and not model.spec.fixed_size
    assert model.classes is not None and (len(model.classes), model.classes[1]) == (91, "person")
    bare = tl.wrap(model.module)
    assert (bare.classes, bare.features) == (model.classes, model.features) == (model.classes, "backbone.features.0")
    picture = Image.fromarray((X[0] * 255).byte().permute(1, 2, 0).numpy())
    torch.testing.assert_close(model.inputs(picture), X[:1], atol=1 / 255, rtol=0)  # in [0, 1], at its own size
    torch.testing.assert_close(model.spec.display(X), X)
    with pytest.raises(UnknownName, match="'person'"):
        model.score(X, tl.box_score("persn", (0, 0, 9, 9)))
    with pytest.raises(UnknownName, match="91 outputs"):
        model.score(X, tl.box_score(91, (0, 0, 9, 9)))
    persons = built("keypointrcnn_resnet50_fpn")
    assert persons.classes == ("no person", "person")
    assert built("fasterrcnn_resnet50_fpn").classes is None
    assert built("fasterrcnn_resnet50_fpn").spec.input_size == (3, 48, 48)


def test_a_detector_of_ones_own_backbone() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1))
    backbone.out_channels = 8
    anchors = D.rpn.AnchorGenerator(sizes=((16, 32),), aspect_ratios=((1.0,),))
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2)
    torch.manual_seed(0)
    module = D.FasterRCNN(
        backbone, 3, rpn_anchor_generator=anchors, box_roi_pool=pool, min_size=64, max_size=96, box_score_thresh=0.0
    )
    model = tl.wrap(module.eval())
    with torch.no_grad():
        target = tl.box_score(*own_box(module(X)[0]))
    assert tl.explain(model, X[:1], target=target).layer == "backbone"


# -- segmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_region_of_torchvisions_class_maps(name: str) -> None:
    model, module = built(name), built(name).module
    maps, label = module(X)["out"], 2
    mask = torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) < 0.2
    target = tl.region(label, mask)
    for one, expected in (
        (target, maps[:, label][:, mask].mean(1)),
        (tl.target(f"region:{label}@8,16,40,50"), maps[:, label, 8:40, 16:50].mean((1, 2))),
        (tl.region(label), maps[:, label].mean((1, 2))),
    ):
        torch.testing.assert_close(model.score(X, one), expected, rtol=1e-4, atol=1e-5)

    x = X[:1].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(module(x)["out"][0, label][mask].mean(), x)
    shares = tl.explain(model, X[:1], target=target, method="saliency").per_channel
    assert shares is not None
    torch.testing.assert_close(shares, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))

    features = module.backbone(X[:1])
    last = "high" if name.startswith("lraspp") else "out"
    leaf = features[last].detach().requires_grad_(True)
    features[last] = leaf
    low = module.classifier(features if name.startswith("lraspp") else leaf)
    value = nn.functional.interpolate(low, size=SIZE, mode="bilinear", align_corners=False)[0, label][mask].mean()
    (gradient,) = torch.autograd.grad(value, leaf)
    found = tl.explain(model, X[:1], target=target, method="grad_cam")
    expected = (gradient.mean((2, 3), keepdim=True) * leaf.detach()).sum(1)
    assert found.layer == "backbone." + ("layer4" if "resnet" in name else "16")
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_question_a_segmentation_model_cannot_answer_names_the_one_it_can(name: str) -> None:
    model = built(name)
    for ask in (lambda: model.predict(X), lambda: tl.explain(model, X), lambda: model.score(X, "logit:1")):
        with pytest.raises(NotApplicable, match=r"tl.region"):
            ask()
    with pytest.raises(NotApplicable, match="sums of logits only"):
        tl.explain(model, X, target="region:1", method="cam")
    with pytest.raises(UnknownName, match="4 outputs, 0 to 3"):
        model.score(X, "region:4")


def test_segmentation_models_are_recognised() -> None:
    model = tl.load("torchvision/lraspp_mobilenet_v3_large", pretrained=False)
    preset = S.LRASPP_MobileNet_V3_Large_Weights.DEFAULT.transforms()
    picture = Image.fromarray((X[0] * 255).byte().permute(1, 2, 0).numpy())
    assert torch.equal(model.inputs(picture)[0], preset(picture))
    assert model.spec.input_size == (3, 520, 520)
    assert model.classes is not None and (len(model.classes), model.classes[12]) == (21, "dog")
    assert tl.wrap(model.module).classes == model.classes
    assert built("fcn_resnet50").embedding_at((3, *SIZE)) == "classifier.4.in"  # not the auxiliary head's
    assert built("fcn_resnet50").trace((3, *SIZE)).outputs == CLASSES
    low = torch.ones(6, 8, dtype=torch.bool)
    with pytest.raises(BadInput, match=r"mask is \[6, 8\].*\[48, 64\]"):
        model.score(X, tl.region("dog", low))
