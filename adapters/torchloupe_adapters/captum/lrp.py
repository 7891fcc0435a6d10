"""Layer-wise relevance propagation, where none is lost or made on the way."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe_adapters.captum.asked import asked, attr, joined, refused_without, tensor_of
from torchloupe_adapters.captum.calls import functions_between, separated
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.query import Map, Query, finite
from torchloupe_core.registry import method

__all__ = ["lrp"]

RULED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
RESHAPING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout2d)  # Captum knows no rule for them, but any will do
PASSED = (nn.ReLU, nn.Tanh, nn.Dropout)
# What may happen between layers without a rule: entries moved, chosen or set to zero.
HARMLESS = {
    *("__get__", "__getitem__", "__len__", "clone", "contiguous", "detach", "dim", "size", "to"),
    *("cat", "chunk", "concat", "concatenate", "expand", "flatten", "narrow", "permute", "reshape", "select", "split"),
    *("squeeze", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"),
    *("dropout", "max_pool2d", "relu", "relu_"),
}

TOLERANCE = 0.05  # of the score: what may be lost or made on the way
INSTEAD = "integrated_gradients is complete on any differentiable model"


@method(
    "explain",
    "captum.lrp",
    needs=("gradient", "rules"),
    cost="2 forwards + 1 backward",
    paper="Bach et al. 2015, On Pixel-Wise Explanations by Layer-Wise Relevance Propagation",
)
def lrp(query: Query, *, epsilon: float = 1e-9, gamma: float = 0.0) -> Map:
    """Each pixel's share of a logit, handed down from layer to layer in proportion to what each input contributed.

    epsilon: added to the denominator, and absorbs relevance. gamma: favours positive weights in convolutions (Montavon
    2019). With both near zero this is input_x_gradient on a network of ReLUs. Relevance ends in pixels or in biases:
    `diagnostics["absorbed"]` is the sum of the latter (and what epsilon took), `diagnostics["conservation_gap"]` the
    score less both sums. Where the gap is not small against the score, or where the model computes between its layers,
    out of reach of the rules, Captum's numbers mean nothing and the method refuses.
    """
    if epsilon < 0 or gamma < 0:
        raise BadInput(f"epsilon and gamma are at least 0; got {epsilon} and {gamma}")
    if any(bound.logit_weights is None for bound in query.targets):
        raise NotApplicable(f"lrp hands down sums of logits only; {INSTEAD}")
    module = query.handle.module
    between = sorted(functions_between(query) - HARMLESS)

    def answer(part: Query) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept: list[Tensor] = []
        rules = _attach_rules(module, epsilon, gamma)
        relevance = _propagated(part, kept)
        absorbed = torch.zeros_like(kept[0])
        for rule in rules:
            absorbed += _of_each(rule.relevance_output) - _of_each(rule.relevance_input)
        gaps = kept[0] - relevance.flatten(1).sum(1) - absorbed
        _require_conservation(kept[0], relevance, gaps, between)
        return relevance, kept[0], absorbed, gaps

    weights = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        with separated(query, PASSED):
            relevance, scores, absorbed, gaps = joined(query.each(answer))
    finally:
        for parameter, data in weights:  # Captum puts back values, in tensors of its own
            parameter.data = data
    if between:
        raise NotApplicable(f"captum's lrp has rules for layers only, and this model {_computes(between)}; {INSTEAD}")
    found = {"absorbed": absorbed.tolist(), "conservation_gap": gaps.tolist()}
    return Map(relevance.sum(1), relevance, scores=scores, diagnostics=found)


def _attach_rules(module: nn.Module, epsilon: float, gamma: float) -> list[Any]:
    """Gives each layer a rule where Captum looks for it, and returns them: they note what flows through."""
    attr()
    from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule

    rules = []
    for layer in module.modules():
        if type(layer) in RESHAPING:
            rule = EpsilonRule()
        elif type(layer) in RULED:
            rule = GammaRule(gamma) if gamma and isinstance(layer, nn.Conv2d) else EpsilonRule(epsilon)
        else:
            continue
        layer.__dict__["rule"] = rule
        rules.append(rule)
    return rules


def _propagated(part: Query, kept: list[Tensor]) -> Tensor:
    """The relevance of the input `[N, C, H, W]`; `kept` gets the scores."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tensor_of(attr().LRP(_HandedDown(part, kept)).attribute(**asked(part)))
    except (TypeError, RuntimeError) as error:
        reason = re.search("type .*? has no rule|used more than once", str(error))
        if reason is None:
            raise
        raise NotApplicable(f"captum's lrp cannot serve this model: {reason[0]}; {INSTEAD}") from error


class _HandedDown(nn.Module):
    """The model with an output of 1 and each logit's contribution to the target as its gradient.

    Captum multiplies what arrives by the output, which is right for one logit only.
    """

    def __init__(self, part: Query, kept: list[Tensor]) -> None:
        super().__init__()
        self.model, self.part, self.kept = part.handle.module, part, kept

    def forward(self, inputs: Tensor, images: Tensor) -> Tensor:
        with self.part.handle.watch(shape=self.part.shape) as watch:
            logits = self.part.handle.logits(watch(inputs))
        refused_without(logits, inputs)
        weights = torch.zeros_like(logits)
        for row, image in enumerate(images.tolist()):
            for label, weight in (self.part.targets[image].logit_weights or {}).items():
                weights[row, label] = weight
        contributions = finite((weights * logits).detach())
        self.kept.append(contributions.sum(1))
        return self.part.handle.counted(1 + (contributions * (logits - logits.detach())).sum(1))


def _of_each(noted: dict[torch.device, Tensor]) -> Tensor | float:
    """The relevance of each image `[N]` in what a rule noted; 0 for a layer that did not run, or noted elsewhere."""
    return sum((one.flatten(1).sum(1) for one in noted.values() if isinstance(one, Tensor)), 0.0)


def _require_conservation(scores: Tensor, relevance: Tensor, gaps: Tensor, between: list[str]) -> None:
    total = relevance.flatten(1).sum(1)
    kept = gaps.abs() <= TOLERANCE * scores.abs()  # not so for NaN
    if not kept.all():
        worst = int(kept.int().argmin())
        raise NotApplicable(
            f"relevance is not conserved: a score of {scores[worst]:.3g} became {total[worst]:.3g} in the pixels, "
            f"{total[worst] / scores[worst]:.3g} times as much, and biases do not account for it. Captum's lrp has "
            f"rules for layers only, and this model {_computes(between)}; {INSTEAD}"
        )


def _computes(between: list[str]) -> str:
    return f"computes {', '.join(between)} between them" if between else "does more than they say"
