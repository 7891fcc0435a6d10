"""torchvision: models, their preprocessing and their class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from torchloupe_adapters import checkpoint as checkpoints
from torchloupe_core.errors import BadInput, MissingDependency, UnknownName
from torchloupe_core.handle import Handle
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
    from torchvision.models import ResNet18_Weights
    from torchvision.transforms._presets import ImageClassification

    size = int(getattr(module, "image_size", NATIVE_SIZES.get(kind.__name__, STANDARD_SIZE)))
    preset = ImageClassification(crop_size=size, resize_size=round(size * 256 / 224))
    return _spec(module, kind.__name__, preset, ResNet18_Weights.DEFAULT.meta["categories"])


def _spec(module: nn.Module, name: str, preset: Any, categories: Any) -> Spec:
    mean, std = getattr(preset, "mean", None), getattr(preset, "std", None)
    size = getattr(module, "image_size", None) or (getattr(preset, "crop_size", None) or [STANDARD_SIZE])[-1]
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
    )


def _outputs(module: nn.Module) -> int | None:
    last = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))][-1:]
    return next((part.out_features if isinstance(part, nn.Linear) else part.out_channels for part in last), None)


def _models() -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingDependency.of("torchvision", None) from error
    return models
