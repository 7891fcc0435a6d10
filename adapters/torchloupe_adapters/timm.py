"""timm: models, their preprocessing and their class names."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from torchloupe_adapters import checkpoint as checkpoints
from torchloupe_core.errors import BadInput, MissingDependency, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.layout import Layout
from torchloupe_core.registry import method
from torchloupe_core.spec import Spec, resize_and_normalise

__all__ = ["load", "recognise"]

NO_MAPS = {
    "Nest": r"levels\.\d+\.transformer_encoder",  # blocks of tokens, [N, blocks, L, C]
    "EfficientVit": r".*\.kernel_func",  # queries and keys, [N, heads, d, L]
    "EfficientViM": r"norm\.[012]",  # hidden states
    "EfficientViMDistilled": r"norm\.[012]",
}


@method("load", "timm", cost="none")
def load(name: str, *, pretrained: bool | None = None, checkpoint: str | Path | None = None, **options: Any) -> Handle:
    """A timm model by name, `resnet50.a1_in1k`. Options go to `timm.create_model`; `num_classes` among them."""
    timm = _timm()
    known = [*timm.list_models(), *timm.list_models(include_tags=True)]
    if name not in known:
        raise UnknownName.of("timm model", name, known)
    wanted = checkpoint is None if pretrained is None else pretrained
    try:
        with _no_waiting_without_network() if wanted else contextlib.nullcontext():
            module = timm.create_model(name, pretrained=wanted, **options)
    except (TypeError, ValueError) as error:
        raise BadInput(f"timm.create_model({name!r}) failed: {error}") from error
    except Exception as error:
        if not wanted:
            raise
        raise BadInput(
            f"the weights of timm/{name} could not be fetched ({_first_line(error)}); give a file with checkpoint=, "
            "or pretrained=False for random weights"
        ) from error
    if checkpoint is not None:
        checkpoints.load_into(module, checkpoint)
    return Handle(module.eval(), _spec(module, name, options.get("img_size")))


@method("recognise", "timm", cost="none")
def recognise(module: nn.Module) -> Spec | None:
    """What timm states about a model it made, or None if it did not make this one."""
    if not type(module).__module__.startswith("timm.") or not hasattr(module, "pretrained_cfg"):
        return None
    stated: Any = module.pretrained_cfg
    return _spec(module, stated.get("architecture") or type(module).__name__)


@contextlib.contextmanager
def _no_waiting_without_network() -> Iterator[None]:
    """Where its host has no address, Hugging Face's client looks into its cache only, instead of retrying a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _spec(module: nn.Module, name: str, asked: Any = None) -> Spec:
    """asked: the image size that the model was made for, where that was an option."""
    from timm.data import create_transform, resolve_model_data_config

    stated: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    config = resolve_model_data_config(module)
    embedding = getattr(module, "patch_embed", None)
    channels = _input_channels(module, stated) or config["input_size"][0]
    asked = (asked, asked) if isinstance(asked, int) else asked
    size = getattr(embedding, "img_size", None) or asked or config["input_size"][1:]
    config["input_size"] = (channels, *size)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if channels == 3:
        preprocess = create_transform(**config, is_training=False)
    else:  # timm's transforms make three channels
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        preprocess = resize_and_normalise(config["input_size"], mean, std)
    return Spec(
        name=name,
        source="timm",
        input_size=config["input_size"],
        fixed_size=bool(stated.get("fixed_input_size")) and getattr(embedding, "strict_img_size", True),
        preprocess=preprocess,
        preprocess_text=f"{config['interpolation']}, crop {config['crop_pct']}, timm's own",
        mean=mean,
        std=std,
        classes=_classes(module),
        prefix=getattr(module, "num_prefix_tokens", None),
        classifier=_classifier(stated),
        layouts=_layouts(module),
    )


def _classifier(stated: dict[str, Any]) -> str | None:
    """Of several heads not DeiT's distilled one nor VOLO's auxiliary one; the last of those that are added up."""
    classifier = stated.get("classifier")
    if isinstance(classifier, (tuple, list)):
        classifier = [one for one in classifier if not re.search("dist|aux", one)][-1:]
        classifier = classifier[0] if classifier else None
    return classifier if isinstance(classifier, str) else None


def _layouts(module: nn.Module) -> dict[str, Layout | None]:
    """Where tokens are in another order than row by row, or are no positions at all."""
    kind, hiera = type(module).__name__, dict[str, Layout | None]()
    if kind == "Hiera":
        parts: Any = module
        for index, block in enumerate(parts.blocks):  # between `unroll` and its last pooling in the order of pooling
            strides, grid = parts.reroll.schedule[index]
            layout = Layout("tokens", block.dim, tuple(grid), unrolled=tuple(map(tuple, strides)))
            hiera.setdefault("unroll", layout)
            hiera[f"blocks.{index}.attn.proj"] = replace(layout, channels=block.dim_out)
        return hiera
    names = (name for name, _ in module.named_modules() if kind in NO_MAPS)
    return {name: None for name in names if re.fullmatch(rf"({NO_MAPS[kind]})(\..*)?", name)}


def _input_channels(module: nn.Module, stated: dict[str, Any]) -> int | None:
    first = stated.get("first_conv")
    parts = dict(module.named_modules())
    convolution = parts.get(first) if isinstance(first, str) else None
    if not isinstance(convolution, nn.Conv2d):
        return None
    folded = [part.bs**2 for part in parts.values() if type(part).__name__ == "SpaceToDepth"]  # TResNet's stem
    return convolution.in_channels // (folded[0] if folded else 1)


def _classes(module: nn.Module) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingDependency.of("timm", None) from error
    logging.getLogger("timm").addHandler(logging.NullHandler())
    return timm


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
