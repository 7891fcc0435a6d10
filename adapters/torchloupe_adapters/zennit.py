"""zennit: layer-wise relevance propagation by composites of rules. Under the LGPL, and installed by users alone.

It works on a copy of the model, whose batch normalisation is merged into the layer before it, and whose parameters it
may exchange. Additions, means and ReLUs between layers, out of its reach, hand relevance down as its Norm and Pass
rules do; a model that computes more between its layers is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchloupe_adapters.captum.calls import functions_between
from torchloupe_adapters.captum.lrp import HARMLESS
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.query import Map, Query, finite
from torchloupe_core.registry import method

__all__ = [
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
]

INSTEAD = "integrated_gradients is complete on any differentiable model"
SAME = 1e-3  # of the largest logit: the same model up to rounding

LINEAR = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
# Modules that zennit has a rule for, and those whose gradient is one: entries moved, chosen or set to zero.
RULED = (*LINEAR, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Softplus, nn.Tanh)
MOVING = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d)
ADDING = {"add", "__add__", "__iadd__", "__radd__", "add_"}
AVERAGING = {"mean", "adaptive_avg_pool2d", "avg_pool2d"}
RECTIFYING = {"relu", "relu_"}

by_rules = partial(method, "explain", needs=("gradient", "rules"), cost="2 forwards + 1 backward through rules")


@by_rules(
    "zennit.epsilon_plus",
    paper="Kohlbrenner et al. 2020, Towards Best Practice in Explaining Neural Network Decisions with LRP",
)
def epsilon_plus(query: Query, *, epsilon: float = 1e-6, biases: bool = True) -> Map:
    """Relevance by the z-plus rule in convolutions, by epsilon in linear layers.

    epsilon: added to the denominator in linear layers. biases: they take their share of the relevance, as they do in
    zennit; without, it is shared out among the inputs. `diagnostics["conservation_gap"]` is the score less the sum of
    the map.
    """
    return _propagated(query, "EpsilonPlus", epsilon, biases)


@by_rules(
    "zennit.epsilon_plus_flat",
    paper="Kohlbrenner et al. 2020, Towards Best Practice in Explaining Neural Network Decisions with LRP",
)
def epsilon_plus_flat(query: Query, *, epsilon: float = 1e-6, biases: bool = True) -> Map:
    """As zennit.epsilon_plus; the first layer shares evenly among the pixels it sees, whatever their values."""
    return _propagated(query, "EpsilonPlusFlat", epsilon, biases)


@by_rules(
    "zennit.epsilon_alpha2_beta1",
    paper="Bach et al. 2015, On Pixel-Wise Explanations by Layer-Wise Relevance Propagation, alpha 2 and beta 1",
)
def epsilon_alpha2_beta1(query: Query, *, epsilon: float = 1e-6, biases: bool = True) -> Map:
    """Relevance by alpha 2, beta 1 in convolutions, by epsilon in linear layers. Options as in zennit.epsilon_plus."""
    return _propagated(query, "EpsilonAlpha2Beta1", epsilon, biases)


@by_rules(
    "zennit.epsilon_alpha2_beta1_flat",
    paper="Kohlbrenner et al. 2020, Towards Best Practice in Explaining Neural Network Decisions with LRP",
)
def epsilon_alpha2_beta1_flat(query: Query, *, epsilon: float = 1e-6, biases: bool = True) -> Map:
    """As zennit.epsilon_alpha2_beta1; the first layer shares evenly among the pixels it sees."""
    return _propagated(query, "EpsilonAlpha2Beta1Flat", epsilon, biases)


@by_rules("zennit.epsilon_gamma_box", paper="Montavon et al. 2019, Layer-Wise Relevance Propagation: An Overview")
def epsilon_gamma_box(query: Query, *, epsilon: float = 1e-6, gamma: float = 0.25, biases: bool = True) -> Map:
    """Relevance by gamma in convolutions, epsilon in linear layers, the box rule in the first layer.

    gamma: favours positive weights. The box holds what pixels can be: black to white where the model's mean and spread
    are known, and each image's own least and greatest values. The rest as in zennit.epsilon_plus.
    """
    if gamma < 0:
        raise BadInput(f"gamma is at least 0; got {gamma}")
    return _propagated(query, "EpsilonGammaBox", epsilon, biases, box=True, gamma=gamma)


# -- the model --------------------------------------------------------------------------------------------------------


def _propagated(
    query: Query, composite: str, epsilon: float, biases: bool, *, box: bool = False, **options: float
) -> Map:
    """The relevance that the pixels get of each image's target."""
    _library("composites")
    if epsilon <= 0:
        raise BadInput(f"epsilon is above 0; got {epsilon}")
    if any(bound.logit_weights is None for bound in query.targets):
        raise NotApplicable(f"zennit hands down sums of logits only; {INSTEAD}")
    _require_rules(query, composite)
    model = _copied(query)
    kind = getattr(_library("composites"), composite)
    zeroed = None if biases else ["bias"]

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        bounds = dict(zip(("low", "high"), _box(part), strict=True)) if box else {}
        rules = kind(**bounds, epsilon=epsilon, zero_params=zeroed, **options)
        logits = _Logits(part)
        ask = _library("attribution").Gradient(logits, rules)
        with torch.enable_grad():
            output, relevance = ask(part.inputs.detach().requires_grad_(True), logits.contributions)
        return relevance.detach(), logits.contributions(output.detach()).sum(1)

    with model.borrow():
        answers = replace(query, handle=model).each(answer)
    query.handle.forwards += model.forwards
    query.handle.backwards += model.backwards
    relevance, scores = map(torch.cat, zip(*answers, strict=True))
    gaps = scores - relevance.flatten(1).sum(1)
    return Map(relevance.sum(1), relevance, scores=scores, diagnostics={"conservation_gap": gaps.tolist()})


class _Logits(nn.Module):
    """The model with its logits as its output, and additions and means that hand relevance down in proportion."""

    def __init__(self, part: Query) -> None:
        super().__init__()
        self.model, self.part = part.handle.module, part

    def forward(self, inputs: Tensor) -> Tensor:
        with self.part.handle.watch(shape=self.part.shape) as watch, _InProportion():
            return self.part.handle.counted(finite(self.part.handle.logits(watch(inputs))))

    def contributions(self, logits: Tensor) -> Tensor:
        """What each logit adds to its image's target, `[N, K]`."""
        weights = torch.zeros_like(logits)
        for row, bound in enumerate(self.part.targets):
            for label, weight in (bound.logit_weights or {}).items():
                weights[row, label] = weight
        return weights * logits


def _copied(query: Query) -> Handle:
    """A copy of the model for zennit to change, batch normalisation merged into the layers before where it can be.

    Which layer comes before is seen in a forward pass, so the merged model's logits are compared with the model's own.
    """
    image, original = query.only(0, 1), query.handle
    expected = original.logits(original.module(image.inputs.clone()))
    original.forwards += 1
    for pairs in (_normalised(query), []):
        model = Handle(copy.deepcopy(original.module), original.spec)
        if pairs:
            _library("canonizers").NamedMergeBatchNorm(pairs).apply(model.module)
        found = _Logits(replace(image, handle=model))(image.inputs)
        if float((found - expected).abs().max()) <= SAME * float(expected.abs().max()):
            return model
    raise NotApplicable(f"this model gives other logits when it computes out of place, as zennit needs; {INSTEAD}")


def _normalised(query: Query) -> list[tuple[list[str], str]]:
    """Layers that run once and right before a batch normalisation, with its name."""
    module, layers = query.handle.module, query.handle.trace(query.shape).layers
    leaves = [layer for name, layer in layers.items() if not list(module.get_submodule(name).children())]
    pairs = []
    for before, after in pairwise(sorted(leaves, key=lambda layer: layer.begins)):
        linear, norm = module.get_submodule(before.name), module.get_submodule(after.name)
        fits = isinstance(linear, LINEAR) and isinstance(norm, nn.BatchNorm2d) and norm.weight is not None
        if fits and before.channels == after.channels and before.calls == after.calls == 1:
            pairs.append(([before.name], after.name))
    return pairs


def _box(part: Query) -> tuple[Tensor, Tensor]:
    """The least and the greatest value that each pixel can have, as the images."""
    black, white = (part.handle.spec.normalised(torch.full_like(part.inputs, value)) for value in (0.0, 1.0))
    low, high = part.inputs.amin((2, 3), keepdim=True), part.inputs.amax((2, 3), keepdim=True)
    if part.handle.spec.mean is None:  # it is not known what black is
        return low.expand_as(black).clone(), high.expand_as(white).clone()
    return torch.minimum(black, low), torch.maximum(white, high)


def _require_rules(query: Query, composite: str) -> None:
    """Raises `NotApplicable` unless every step of the model has a rule."""
    layers = query.handle.trace(query.shape).layers
    for name, layer in layers.items():
        module = query.handle.module.get_submodule(name)
        if list(module.children()):
            continue
        if not isinstance(module, (*RULED, *ACTIVATIONS, *MOVING)):
            raise NotApplicable(f"zennit's {composite} has no rule for {layer.kind}, as {name!r}; {INSTEAD}")
        if layer.calls > 1 and isinstance(module, RULED):
            raise NotApplicable(f"{name!r} runs {layer.calls} times, and zennit remembers its last input; {INSTEAD}")
    between = sorted(functions_between(query) - HARMLESS - ADDING - AVERAGING)
    if between:
        raise NotApplicable(
            f"zennit has rules for layers only, and this model computes {', '.join(between)} between them; {INSTEAD}"
        )


# -- between layers ---------------------------------------------------------------------------------------------------


class _InProportion(TorchFunctionMode):
    """Inside, sums and means hand relevance down to each part in proportion to its contribution, ReLUs as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RECTIFYING:
            return _Passed.apply(args[0])
        if name in AVERAGING:
            return _Shared.apply(lambda x: func(x, *args[1:], **given), args[0])
        if name in ADDING and len(args) == 2 and all(_depends(one) for one in args):
            return _Shared.apply(lambda x, y: torch.add(x, y, **given), *args)
        return func(*args, **given)


def _depends(value: object) -> bool:
    """Whether it depends on the image: biases added between layers take no relevance."""
    return isinstance(value, Tensor) and value.requires_grad


class _Passed(torch.autograd.Function):
    """ReLU, whose relevance is handed down as it is: the Pass rule, for those that are functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Tensor:
        return relevance


class _Shared(torch.autograd.Function):
    """A linear operation whose way back is that of relevance: each input's contribution over the sum of all."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [one.detach().requires_grad_(True) for one in ctx.saved_tensors]
            output = ctx.run(*inputs)
            share = relevance / _library("core").stabilize(output.detach())
            gradients = torch.autograd.grad(output, inputs, share)
        return None, *(one.detach() * gradient for one, gradient in zip(inputs, gradients, strict=True))


def _library(module: str) -> Any:
    """A module of zennit's."""
    try:
        import zennit.attribution
        import zennit.canonizers
        import zennit.composites
        import zennit.core
    except ImportError as error:
        raise MissingDependency.of("zennit", None) from error
    return getattr(zennit, module)
