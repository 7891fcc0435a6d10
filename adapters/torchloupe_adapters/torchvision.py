"""torchvision: models, their preprocessing and their class names.

Detectors take pictures of any size in [0, 1] and resize, normalise and pad them inside, to multiples of 32: their
layers' maps reach that much beyond the right and lower edge of the image.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from torchloupe_adapters import checkpoint as checkpoints
from torchloupe_core.errors import BadInput, MissingDependency, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.layout import Layout
from torchloupe_core.registry import method
from torchloupe_core.spec import Spec

__all__ = ["load", "recognise"]

NATIVE_SIZES = {"Inception3": 299}
STANDARD_SIZE = 224


@method("load", "torchvision", cost="none")
def load(
    name: str,
    *,
    weights: str | None = None,
    pretrained: bool | None = None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Handle:
    """A torchvision model by name, `resnet50`. Options go to `torchvision.models.get_model`.

    weights: an entry of the model's weights, as "IMAGENET1K_V2"; the default ones unless told otherwise.
    """
    models = _models()
    if name not in models.list_models():
        raise UnknownName.of("torchvision model", name, models.list_models())
    known = models.get_model_weights(name)
    if weights is not None and weights not in [*known.__members__, "DEFAULT"]:
        raise UnknownName.of(f"weights for torchvision/{name}", weights, known.__members__)
    wanted = checkpoint is None if pretrained is None else pretrained
    chosen = known[weights or "DEFAULT"] if wanted else None
    if chosen is None and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options.setdefault("weights_backbone", None)  # else the backbone's are fetched for a detector without weights
    try:
        module = models.get_model(name, weights=chosen, **options)
    except (TypeError, ValueError) as error:
        raise BadInput(f"torchvision.models.get_model({name!r}) failed: {error}") from error
    except OSError as error:
        raise BadInput(
            f"the weights of torchvision/{name} could not be fetched ({error}); give a file with checkpoint=, or "
            "pretrained=False for random weights"
        ) from error
    if checkpoint is not None:
        checkpoints.load_into(module, checkpoint)
    facts = known[weights or "DEFAULT"]
    return Handle(module.eval(), _spec(module, name, facts.transforms(), facts.meta.get("categories")))


@method("recognise", "torchvision", cost="none")
def recognise(module: nn.Module) -> Spec | None:
    """What torchvision's standard evaluation preset says of a model of its, or None if it is not one."""
    kind = type(module)
    if not kind.__module__.startswith("torchvision.models."):
        return None
    from torchvision.models import ResNet18_Weights, detection, segmentation
    from torchvision.transforms._presets import ImageClassification

    known: Any = None
    if _is_detector(module):
        persons = kind.__name__ == "KeypointRCNN"
        known = detection.KeypointRCNN_ResNet50_FPN_Weights if persons else detection.FasterRCNN_ResNet50_FPN_Weights
    elif _segments(module):
        known = segmentation.FCN_ResNet50_Weights
    if known is not None:
        return _spec(module, kind.__name__, known.DEFAULT.transforms(), known.DEFAULT.meta["categories"])
    size = int(getattr(module, "image_size", NATIVE_SIZES.get(kind.__name__, STANDARD_SIZE)))
    preset = ImageClassification(crop_size=size, resize_size=round(size * 256 / 224))
    return _spec(module, kind.__name__, preset, ResNet18_Weights.DEFAULT.meta["categories"])


def _spec(module: nn.Module, name: str, preset: Any, categories: Any) -> Spec:
    mean, std = getattr(preset, "mean", None), getattr(preset, "std", None)
    size = getattr(module, "image_size", None) or _native_size(module, preset)
    return Spec(
        name=name,
        source="torchvision",
        input_size=(3, size, size),
        fixed_size=hasattr(module, "image_size"),
        preprocess=preset,
        preprocess_text="torchvision's own",
        mean=tuple(mean) if mean else None,
        std=tuple(std) if std else None,
        classes=tuple(categories) if categories and len(categories) == _outputs(module) else None,
        prefix=1 if type(module).__name__ == "VisionTransformer" else None,
        classifier=_last_of_head(module),
        layouts=_no_maps(module) if _is_detector(module) else {},
        features=_deepest(module),
    )


def _last_of_head(module: nn.Module) -> str | None:
    """The layer that gives a segmentation model's logits; an auxiliary head may run after it."""
    head = getattr(module, "classifier", None)
    return f"classifier.{len(head) - 1}" if _segments(module) and isinstance(head, nn.Sequential) else None


def _native_size(module: nn.Module, preset: Any) -> int:
    """The side of the images a model was made for; detectors bring others to it themselves."""
    inside = getattr(module, "transform", None)
    if _is_detector(module) and inside is not None:
        return int((inside.fixed_size or inside.min_size)[-1])
    stated = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None) or [STANDARD_SIZE]
    return int(stated[-1])


def _is_detector(module: nn.Module) -> bool:
    return type(getattr(module, "transform", None)).__name__ == "GeneralizedRCNNTransform"


def _segments(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torchvision.models.segmentation.")


def _no_maps(module: nn.Module) -> dict[str, Layout | None]:
    """Parts of a detector that give no map of the image, whatever their shape: what sees proposals or all anchors."""
    whole = ("rpn", "rpn.head", "head", "head.classification_head", "head.regression_head")
    return {
        name: None
        for name, part in module.named_modules()
        if name.startswith("roi_heads") or name in whole or "Anchor" in type(part).__name__
    }


def _deepest(module: nn.Module) -> str | None:
    """Of detectors and segmentation models the last backbone layer that everything after depends on.

    Below a feature pyramid it is the last one; SSD's levels follow one another, so it is the first of them.
    """
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, nn.Module) or not (_is_detector(module) or _segments(module)):
        return None
    if _is_detector(module) and hasattr(backbone, "extra"):
        steps = list(backbone.get_submodule("features").children())
        return "backbone.features.0" if len(steps) == 2 else "backbone.features"
    trunk, path = (backbone.body, "backbone.body") if hasattr(backbone, "body") else (backbone, "backbone")
    if isinstance(trunk, nn.ModuleDict):  # torchvision's IntermediateLayerGetter ends after the last layer it returns
        return f"{path}.{list(trunk)[-1]}"
    return path if isinstance(trunk, nn.Sequential) else None


def _outputs(module: nn.Module) -> int | None:
    if _is_detector(module):
        return _detected(module)
    parts = [part for name, part in module.named_modules() if not name.startswith("aux_classifier")]
    last = [part for part in parts if isinstance(part, (nn.Linear, nn.Conv2d))][-1:]
    return next((part.out_features if isinstance(part, nn.Linear) else part.out_channels for part in last), None)


def _detected(module: nn.Module) -> int | None:
    """How many classes a detector knows, background included."""
    heads = dict(module.named_modules())
    if (scores := heads.get("roi_heads.box_predictor.cls_score")) is not None:
        return int(scores.out_features)
    head = heads.get("head.classification_head")
    count = getattr(head, "num_classes", getattr(head, "num_columns", None))
    return None if count is None else int(count)


def _models() -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingDependency.of("torchvision", None) from error
    return models
