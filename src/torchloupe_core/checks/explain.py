"""What every method of `explain` promises."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchloupe_core import registry
from torchloupe_core.attention import plain_attention
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.checks.trial import Trial, gap, tolerance
from torchloupe_core.errors import BadInput, LoupeError, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.watch import Place

__all__ = ["CHECKS", "lacks"]

Check = Callable[[Trial], None]

POOLED_TOLERANCE = 1e-3  # of the largest logit: CAM's identity holds to rounding or not at all
DOUBLE_SLACK = 100  # float32 against float64: rounding grows with depth
OWN_JUDGEMENT = {"rules"}  # needs that only the method can tell; the tests' table of refusals pins where it does

CHECKS: dict[str, Check] = {}


def _check(function: Check) -> Check:
    """Adds a check that every model answers, a refused one too."""
    CHECKS[function.__name__] = function
    return function


def _check_unless_refused(function: Check) -> Check:
    """Adds a check of results; a refusal gives none and passes."""

    def check(trial: Trial) -> None:
        if not trial.refused:
            function(trial)

    check.__name__, check.__doc__ = function.__name__, function.__doc__
    CHECKS[function.__name__] = check
    return check


# -- the result -------------------------------------------------------------------------------------------------------


@_check_unless_refused
def shapes(trial: Trial) -> None:
    """Values are float32 maps `[N, h, w]` no larger than the image, with a score and a picture for each."""
    found, n, (channels, height, width) = trial.reference, len(trial.inputs), trial.shape
    values = found.values
    fits = values.ndim == 3 and len(values) == n and 0 < values.shape[1] <= height and 0 < values.shape[2] <= width
    trial.require(fits, f"values have shape {list(values.shape)}; expected [{n}, h, w] within {height} x {width}")
    trial.require(values.dtype == torch.float32, f"values are {values.dtype}, not float32")
    trial.require(found.scores.shape == (n,), f"scores have shape {list(found.scores.shape)}, not [{n}]")
    trial.require(found.images.shape == (n, 3, height, width), f"images have shape {list(found.images.shape)}")
    shares = found.per_channel
    right = shares is None or tuple(shares.shape) == (n, channels, height, width)
    trial.require(right, f"per_channel has shape {shares if shares is None else list(shares.shape)}, not [N, C, H, W]")
    error = found.standard_error
    right = error is None or (error.shape == values.shape and error.dtype == torch.float32 and bool((error >= 0).all()))
    trial.require(right, "standard_error is not a float32 map of the values' shape, nowhere negative")
    held = [name for name in ("values", "scores", "images") if getattr(found, name).requires_grad]
    trial.require(not held, f"{', '.join(held)} hold on to a graph")


@_check
def finite(trial: Trial) -> None:
    """No NaN, no infinity; no image's map is zero throughout; unsigned methods give no negative value."""
    try:
        values = trial.reference.values
    except NotApplicable:
        return
    except BadInput as error:
        raise AssertionError(f"{trial}: {error}") from error
    trial.require(bool(values.isfinite().all()), "values hold NaN or infinity")
    empty = [index for index, one in enumerate(values) if not one.any()]
    trial.require(not empty, f"the map of image {', '.join(map(str, empty))} is zero everywhere")
    trial.require(trial.method.signed or bool((values >= 0).all()), "tagged signed=False, yet some values are negative")


@_check_unless_refused
def seeds(trial: Trial) -> None:
    """The same seed gives the same result whatever the global random state; another one differs only if tagged so."""
    allowed = tolerance(trial.reference, trial.handle.dtype)
    torch.rand(3), np.random.random(), random.random()
    same = gap(trial.run(), trial.reference) <= allowed
    trial.require(same, "the same seed gives another result, so it draws from a global random state")
    other = trial.run(seed=1)
    if trial.method.random:
        moved = not torch.equal(other.values, trial.reference.values)
        trial.require(moved, "tagged random=True, yet another seed gives the same result")
    else:
        apart = gap(other, trial.reference)
        trial.require(apart <= allowed, "another seed gives another result; tag it random=True")


@_check_unless_refused
def batch_size(trial: Trial) -> None:
    """How many images go through the model at once changes nothing but rounding."""
    for size in sorted({1, 2, len(trial.inputs)}):
        trial.require_equal(trial.run(batch_size=size), trial.reference, f"batch_size={size}")


@_check_unless_refused
def images_alone(trial: Trial) -> None:
    """Each image asked about alone gets the map it has in the batch."""
    for index in range(len(trial.inputs)):
        alone = trial.run(trial.inputs[index : index + 1])
        trial.require_equal(alone, trial.reference[index], f"image {index} alone instead of in its batch")


@_check_unless_refused
def targets(trial: Trial) -> None:
    """One target for the batch is the same listed; a list gives one each; a wrong count is a `ValueError`."""
    classes = trial.handle.trace(trial.shape).outputs or 1
    first, second = "logit:0", f"logit:{classes - 1}"
    pair = trial.inputs[:2]
    one, listed = trial.run(pair, target=first), trial.run(pair, target=[first] * len(pair))
    trial.require_equal(one, listed, "one target for the batch instead of the same listed")
    each = trial.run(pair, target=[first, second][: len(pair)])
    trial.require_equal(each[0], one[0], "image 0, where image 1 has another target,")
    if len(pair) > 1:
        alone = trial.run(pair[1:], target=second)
        trial.require_equal(each[1], alone, "image 1 with its own target in a list instead of alone")
    with _expected(trial, ValueError, "more targets than images"):
        trial.run(pair, target=[first] * (len(pair) + 1))


@_check_unless_refused
def layers(trial: Trial) -> None:
    """A method that needs a layer reads the one it is told and says which; any other refuses `layer=`."""
    name = trial.handle.features_at(trial.shape)
    if "layer" not in trial.method.needs:
        with _expected(trial, ValueError, "layer= where no layer is read"):
            trial.run(layer=name)
        return
    trial.require(trial.reference.layer is not None, "the result does not state the layer it read")
    told = trial.run(layer=trial.reference.layer)
    trial.require_equal(told, trial.reference, f"the default layer {trial.reference.layer!r}, named,")
    with _expected(trial, LookupError, "a layer that does not exist"):
        trial.run(layer="no_such_layer")


@_check
def options(trial: Trial) -> None:
    """An option the method does not have is refused, and the message lists those it has."""
    with _expected(trial, (TypeError, ValueError), "an unknown option") as caught:
        trial.run(no_such_option=1)
    missing = [name for name in trial.method.options if not re.search(rf"\b{re.escape(name)}\b", caught[0])]
    trial.require(not missing, f"the refusal of an unknown option does not list {', '.join(missing)}: {caught[0]}")


# -- nothing left behind ----------------------------------------------------------------------------------------------


@_check
def leaves_nothing(trial: Trial) -> None:
    """After an answer or a refusal, model, inputs and process are as they were."""
    handle, inputs = _in_use(trial)
    before = Snapshot(handle.module, inputs)
    found = trial.attempt(inputs, on=handle)
    _require_untouched(trial, before, "a refusal" if found is None else "an answer")


@_check
def errors(trial: Trial) -> None:
    """An exception inside the model, early or late, comes out as it is and leaves nothing behind."""
    _interrupted(trial, lambda: RuntimeError("an error inside the model"), "an exception inside the model")


@_check
def interrupts(trial: Trial) -> None:
    """So does Ctrl-C."""
    _interrupted(trial, lambda: KeyboardInterrupt("Ctrl-C inside the model"), "Ctrl-C inside the model")


def _interrupted(trial: Trial, error: Callable[[], BaseException], event: str) -> None:
    handle, inputs = _in_use(trial)
    parts = _leaves(trial, handle)
    _fail(trial, handle, inputs, parts[0], error(), 1, event)  # nothing known about the model yet
    trial.attempt(inputs, on=handle)
    with _failing(parts[-1], None, 0) as calls:
        trial.attempt(inputs, on=handle)
    for at in sorted({1, calls[0] // 2 + 1, calls[0]} if calls[0] else ()):
        _fail(trial, handle, inputs, parts[-1], error(), at, event)
    after = trial.attempt(inputs, on=handle)
    trial.require((after is None) == trial.refused, f"it no longer answers after {event}")
    if after is not None:
        trial.require_equal(after, trial.reference, f"the same question after {event}")


def _fail(
    trial: Trial, handle: Handle, inputs: Tensor, part: nn.Module, error: BaseException, at: int, event: str
) -> None:
    """Asks once with `error` raised in the at-th forward of `part`."""
    caught: BaseException | None = None
    with _failing(part, error, at) as calls:
        before = Snapshot(handle.module, inputs)
        try:
            trial.run(inputs, on=handle)
        except BaseException as raised:
            if isinstance(raised, (KeyboardInterrupt, SystemExit)) and raised is not error:
                raise
            caught = raised
        _require_untouched(trial, before, f"{event}, in forward {at}")
    outcome = "was swallowed" if caught is None else f"came out as {type(caught).__name__}: {caught}"
    trial.require(caught is error or calls[0] < at, f"{event}, in forward {at}, {outcome}")


def _require_untouched(trial: Trial, before: Snapshot, event: str) -> None:
    changed = before.differences()
    more = f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
    trial.require(not changed, f"left behind after {event}: {'; '.join(changed[:8])}{more}")


# -- callers and models in any state ----------------------------------------------------------------------------------


@_check_unless_refused
def callers(trial: Trial) -> None:
    """The caller may be inside `no_grad` or `inference_mode`, with inputs made there."""
    for name, mode in (("torch.no_grad()", torch.no_grad), ("torch.inference_mode()", torch.inference_mode)):
        handle = trial.copy()
        with mode():
            inputs = trial.inputs.clone()
            with _expecting_none(trial, f"a caller inside {name}"):
                found = trial.run(inputs, on=handle)
        trial.require_equal(found, trial.reference, f"a caller inside {name}")


@_check_unless_refused
def frozen(trial: Trial) -> None:
    """Parameters that require no gradient change nothing."""
    handle = trial.copy()
    handle.module.requires_grad_(False)
    with _expecting_none(trial, "a frozen model"):
        found = trial.run(on=handle)
    trial.require_equal(found, trial.reference, "a frozen model")


@_check_unless_refused
def train_mode(trial: Trial) -> None:
    """A model in train mode answers as in eval mode; its statistics do not move."""
    handle = trial.copy()
    handle.module.train()
    before = Snapshot(handle.module)
    found = trial.run(on=handle)
    trial.require_equal(found, trial.reference, "a model in train mode")
    _require_untouched(trial, before, "an answer of a model in train mode")


@_check_unless_refused
def double(trial: Trial) -> None:
    """A float64 model answers in its own precision; the result is float32 as ever."""
    handle = trial.copy()
    handle.module.double()
    with _expecting_none(trial, "a float64 model"):
        found = trial.run(trial.inputs.double(), on=handle)
    trial.require(found.values.dtype == torch.float32, f"values of a float64 model are {found.values.dtype}")
    trial.require_equal(found, trial.reference, "a float64 model", slack=DOUBLE_SLACK)


# -- refusals ---------------------------------------------------------------------------------------------------------


@_check
def refusals(trial: Trial) -> None:
    """It refuses a model that lacks what its `needs` say, and no other, and its message says what would work."""
    lacking = lacks(trial)
    if not isinstance(trial.outcome, NotApplicable):
        trial.require(not lacking, f"it must refuse this model, which lacks {'; '.join(lacking)}")
        return
    message = str(trial.outcome)
    due = bool(lacking) or "target" in trial.options or not OWN_JUDGEMENT.isdisjoint(trial.method.needs)
    trial.require(
        due, f"it refuses a model that has all it needs ({', '.join(trial.method.needs) or 'nothing'}): {message}"
    )
    names = {one.name for one in registry.methods(trial.method.verb)} - {trial.method.name}
    others = names | {name.split(".")[-1] for name in names}
    named = any(re.search(rf"\b{re.escape(name)}\b", message) for name in others)
    trial.require(named or bool(re.search(r"\w+=", message)), f"the refusal names nothing that would work: {message}")


def lacks(trial: Trial) -> list[str]:
    """What a model lacks of a method's `needs`, in words."""
    return [f"{need}: {why}" for need in trial.method.needs if need in _LACKING and (why := _LACKING[need](trial))]


def _no_attention(trial: Trial) -> str:
    try:
        plain_attention(trial.handle, trial.shape)
    except NotApplicable as error:
        return str(error)
    return ""


def _no_layer(trial: Trial) -> str:
    try:
        trial.handle.features_at(trial.shape)
    except NotApplicable as error:
        return str(error)
    return ""


def _no_nchw(trial: Trial) -> str:
    layer = trial.handle.layer(str(trial.options.get("layer") or trial.handle.features_at(trial.shape)), trial.shape)
    order = layer.layout.order if layer.layout else "unknown"
    return "" if order == "nchw" else f"the layout of {layer.name!r} is {order}"


def _no_rectifier(trial: Trial) -> str:
    return "" if trial.handle.trace(trial.shape).rectified else "there is no ReLU"


def _no_relu(trial: Trial) -> str:
    trace = trial.handle.trace(trial.shape)
    modules = sum(layer.kind == "ReLU" for layer in trace.calls.values())
    if not modules:
        return "there is no torch.nn.ReLU"
    return "some rectifications are functions, not modules" if trace.rectified > modules else ""


def _no_pooled_linear(trial: Trial) -> str:
    """Whether the logits are anything but a linear layer of the features' mean over positions."""
    handle, shape = trial.handle, trial.shape
    try:
        layer, entry = str(trial.options.get("layer") or handle.features_at(shape)), handle.embedding_at(shape)
    except NotApplicable as error:
        return str(error)
    classifier = handle.module.get_submodule(Place.parse(entry).module)
    if not isinstance(classifier, (nn.Linear, nn.Conv2d)):
        return f"the model ends in {type(classifier).__name__}"
    with handle.watch(layer, through=True, shape=shape) as watch:
        logits = handle.logits(watch(handle.inputs(trial.inputs)))
        pooled = watch.map(layer).mean((2, 3))
    weight = classifier.weight.detach().flatten(1)
    if weight.shape[1] != pooled.shape[1]:
        return f"{layer!r} has {pooled.shape[1]} channels, the classifier takes {weight.shape[1]}"
    if len(weight) != logits.shape[1]:
        return "more follows the classifier"
    apart = float((F.linear(pooled, weight, classifier.bias) - logits).detach().abs().max())
    return "" if apart <= POOLED_TOLERANCE * float(logits.abs().max()) else f"more follows {layer!r} than pooling"


_LACKING = {
    "attention": _no_attention,
    "layer": _no_layer,
    "nchw": _no_nchw,
    "pooled_linear": _no_pooled_linear,
    "rectified": _no_rectifier,
    "relu": _no_relu,
}


# -- staging ----------------------------------------------------------------------------------------------------------


def _in_use(trial: Trial) -> tuple[Handle, Tensor]:
    """A copy of the model in the middle of someone's training, and inputs that have a gradient."""
    handle, inputs = trial.copy(), trial.inputs.detach().clone().requires_grad_(True)
    inputs.grad = torch.ones_like(inputs)
    for index, part in enumerate(handle.module.modules()):
        part.training = index % 2 == 0
    for index, parameter in enumerate(handle.module.parameters()):
        parameter.requires_grad_(index % 3 != 2)
        parameter.grad = torch.full_like(parameter, float(index)) if index % 2 == 0 else None
    return handle, inputs


def _leaves(trial: Trial, handle: Handle) -> list[nn.Module]:
    """The modules without children that run, in forward order."""
    found = sorted(trial.handle.trace(trial.shape).layers.values(), key=lambda layer: layer.ends)
    modules = [handle.module.get_submodule(layer.name) for layer in found]
    return [module for module in modules if not list(module.children())] or [handle.module]


@contextlib.contextmanager
def _failing(module: nn.Module, error: BaseException | None, at: int) -> Iterator[list[int]]:
    """Counts a module's forwards, in a list of one number, and raises `error` in the at-th."""
    calls, forward, own = [0], module.forward, module.__dict__.get("forward")

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if error is not None and calls[0] == at:
            raise error
        return forward(*args, **kwargs)

    module.__dict__["forward"] = broken
    try:
        yield calls
    finally:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.__dict__["forward"] = own


@contextlib.contextmanager
def _expected(trial: Trial, kind: type[Exception] | tuple[type[Exception], ...], cause: str) -> Iterator[list[str]]:
    """Inside, an error of torchloupe's own and of this kind must be raised; its message is handed over in a list."""
    message: list[str] = []
    try:
        yield message
    except Exception as error:
        message.append(str(error))
        right = isinstance(error, kind) and isinstance(error, LoupeError)
        trial.require(right, f"{cause} raises {type(error).__name__}, which no caller expects: {error}")
    trial.require(bool(message), f"{cause} raises nothing")


@contextlib.contextmanager
def _expecting_none(trial: Trial, situation: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{trial}: {situation} makes it fail with {type(error).__name__}: {error}") from error
