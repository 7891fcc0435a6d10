"""What every model promises, whichever source it comes from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchloupe_core.checks.trial import Source
from torchloupe_core.errors import NotApplicable
from torchloupe_core.layout import to_map
from torchloupe_core.targets import layer as whole_layer
from torchloupe_core.trace import is_inside_attention

__all__ = ["CHECKS"]

Check = Callable[[Source], None]

CAM_TOLERANCE = 1e-3  # of the largest logit

CHECKS: dict[str, Check] = {}


def _check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


@_check
def forward_order(source: Source) -> None:
    """`layers` are the modules that run, in the order in which they finish for the last time."""
    finished, listed = source.survey.order, list(source.handle.trace(source.shape).layers)
    source.require(bool(listed), "no layers")
    wrong = next((pair for pair in zip(listed, finished, strict=False) if pair[0] != pair[1]), None)
    source.require(
        wrong is None,
        f"layers are not in forward order: {wrong and wrong[0]!r} stands where {wrong and wrong[1]!r} runs",
    )
    source.require(len(listed) == len(finished), f"{len(listed)} layers are listed and {len(finished)} run")


@_check
def maps(source: Source) -> None:
    """Every spatial layer gives the `[N, C, h, w]` it states, for a batch unlike the one it was traced with."""
    source.require(bool(source.survey.sights), "no spatial layer")
    for seen in source.survey.sights:
        layer, stated = seen.layer, (source.survey.images, seen.layer.channels, *(seen.layer.size or ()))
        found = seen.shape or f"none at all ({seen.problem})"
        source.require(found == stated, f"layer {layer.name!r} states a map of {list(stated)} and gives {found}")


@_check
def orientation(source: Source) -> None:
    """Where the image changes, every spatial layer's map changes: rows, columns and tokens are in their places."""
    wrong = next((seen for seen in source.survey.sights if seen.misplaced), None)
    if wrong is not None:
        rows, columns = ("upper", "lower"), ("left", "right")
        lower, right = wrong.misplaced or (0, 0)
        source.require(
            False,
            f"the map of {wrong.layer.name!r} ({wrong.layer.layout}) does not move most in its {rows[lower]} "
            f"{columns[right]} quarter when the image changes there; state its layout with layouts=",
        )


@_check
def features(source: Source) -> None:
    """The default layer is spatial, outside attention, and moves the embedding, or the output if it comes later."""
    handle, shape = source.handle, source.shape
    name = handle.features_at(shape)
    layer = handle.layer(name, shape)
    source.require(layer.spatial, f"features is {name!r}, which has no positions")
    kinds = {other: found.kind for other, found in handle.trace(shape).layers.items()}
    source.require(not is_inside_attention(name, kinds), f"features is {name!r}, a part of attention")
    end = handle.embedding_at(shape)
    earlier = layer.ends < handle.layer(end, shape).begins
    with handle.watch(end, leaf=name, through=True, shape=shape) as watch, torch.enable_grad():
        output = watch(_inputs(source))
        value = _weighed(watch[end] if earlier else handle.logits(output))
        depends = value.requires_grad
        gradient = torch.autograd.grad(value, watch[name], allow_unused=True)[0] if depends else None
    source.require(gradient is not None, f"neither embedding {end!r} nor output depend on features, {name!r}")
    if gradient is not None and layer.layout is not None:
        moved = to_map(gradient, layer.layout).flatten(1).any(1).all()
        source.require(bool(moved), f"the positions of features, {name!r}, have no gradient from {end!r}")


@_check
def predicts(source: Source) -> None:
    """`predict` gives the model's own best classes, most probable first, with their names."""
    handle, inputs = source.handle, _inputs(source)
    with handle.borrow():
        logits = handle.logits(handle.module(inputs.clone())).float().cpu()
    guesses = handle.predict(inputs, k=3)
    source.require(len(guesses) == len(inputs), f"{len(guesses)} predictions for {len(inputs)} images")
    for guessed, row in zip(guesses, logits, strict=True):
        shown = [row[guess.index].item() for guess in guessed]
        gap = abs(shown[0] - row.max().item())
        source.require(gap <= 1e-3 * max(1.0, row.abs().max().item()), "predict does not name the largest logit")
        ordered = [guess.probability for guess in guessed]
        source.require(ordered == sorted(ordered, reverse=True), "predictions are not ordered by probability")
        named = all(guess.name == handle.name_of(guess.index) for guess in guessed)
        source.require(named, "a predicted name is not that of its class")


@_check
def units(source: Source) -> None:
    """A channel and a neuron in the middle of the model can be scored and explained, and are what the map shows."""
    told = [seen.layer.name for seen in source.survey.sights if seen.moved]
    source.require(bool(told), "no spatial layer whose map depends on the image")
    name = told[len(told) // 2]
    inputs, text = _inputs(source), str(whole_layer(name))
    with source.handle.watch(name, shape=source.shape) as watch:
        watch(inputs)
        values = watch.map(name)
    unit = int(values.abs().mean((0, 2, 3)).argmax())  # rectifiers make many that say nothing
    channel = values[:, unit]
    for target, expected in ((f"{text}:{unit}", channel.mean((1, 2))), (f"{text}:{unit}@0,0", channel[:, 0, 0])):
        scores = source.handle.score(inputs, target)
        close = torch.allclose(scores, expected.cpu(), rtol=1e-3, atol=1e-3 * float(values.abs().max()))
        source.require(close, f"{target} scores {scores.tolist()}; its map says {expected.tolist()}")
    _telling(source, "saliency", f"{text}:{unit}")


@_check
def cam(source: Source) -> None:
    """CAM's mean plus the bias is the logit, or CAM refuses."""
    handle = source.handle
    try:
        found = source.explain(handle, source.inputs, method="cam", target="logit:0", progress=False)
    except NotApplicable:
        return
    classifier = handle.module.get_submodule(handle.embedding_at(source.shape).removesuffix(".in"))
    bias = getattr(classifier, "bias", None)
    offset = 0.0 if bias is None else float(bias.detach()[0])
    gap = float((found.values.mean((1, 2)) + offset - found.scores).abs().max())
    allowed = CAM_TOLERANCE * max(float(found.scores.abs().max()), 1.0)
    source.require(gap <= allowed, f"the mean of CAM plus the bias misses the logit by {gap:.3g}")


@_check
def grad_cam(source: Source) -> None:
    """Grad-CAM is finite and says something about each image."""
    _telling(source, "grad_cam", _asked(source))


@_check
def saliency(source: Source) -> None:
    """So is the gradient with respect to the input."""
    _telling(source, "saliency", _asked(source))


def _telling(source: Source, method: str, target: str | None) -> None:
    found = source.explain(source.handle, source.inputs, method=method, target=target, progress=False)
    source.require(bool(found.values.isfinite().all()), f"{found.method} holds NaN or infinity")
    empty = [index for index, one in enumerate(found.values) if not one.any()]
    source.require(not empty, f"{found.method} is zero everywhere for image {', '.join(map(str, empty))}")


def _inputs(source: Source) -> Tensor:
    return source.handle.inputs(source.inputs)


def _weighed(tensor: Tensor) -> Tensor:
    """The sum of a tensor's values, each times a random number."""
    return (tensor * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)).sum()


def _asked(source: Source) -> str | None:
    """The default target; the embedding where the classifier is still all zeros, as timm makes some."""
    end = source.handle.embedding_at(source.shape)
    classifier = source.handle.module.get_submodule(end.removesuffix(".in"))
    weight = getattr(classifier, "weight", None)
    return str(whole_layer(end)) if isinstance(weight, Tensor) and not weight.any() else None
