"""Metrics that ask a method again: of another model, another seed, the same question put otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torchloupe_core.borrow import kept_randomness
from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.metrics.alike import spearman
from torchloupe_core.metrics.case import FEW, Again, Case, of_first
from torchloupe_core.registry import method

__all__ = [
    "completeness_gap",
    "input_invariance",
    "randomisation",
    "randomisation_rise",
    "randomised",
    "seed_stability",
]

STAGES = 4
BINS = 100


def randomised(handle: Handle, shape: Shape, stages: int, seed: int) -> Iterator[Handle]:
    """Copies of a model with more and more of its layers initialised anew, from the last one that runs to the first.

    A module is initialised as its `reset_parameters` does; one without it gets normal numbers of its parameters' mean
    and standard deviation.
    """
    module = copy.deepcopy(handle.module)
    layers = handle.trace(shape).layers
    owners = [name for name, part in module.named_modules() if list(part.parameters(recurse=False))]
    late = sorted(owners, key=lambda name: layers[name].begins if name in layers else -1, reverse=True)
    parts = dict(module.named_modules())
    for stage in range(stages):
        begin, end = (len(late) * one // stages for one in (stage, stage + 1))
        with kept_randomness():
            torch.manual_seed(seed + stage)
            for name in late[begin:end]:
                _reset(parts[name])
        yield Handle(copy.deepcopy(module), handle.spec)


@torch.no_grad()
def _reset(part: nn.Module) -> None:
    again = getattr(part, "reset_parameters", None)
    if callable(again):
        statistics = {name: buffer.clone() for name, buffer in part.named_buffers(recurse=False)}
        again()
        for name, buffer in part.named_buffers(recurse=False):  # what a normalisation saw is no parameter
            buffer.copy_(statistics[name])
        return
    for parameter in part.parameters(recurse=False):
        spread = parameter.std(correction=0) if parameter.numel() > 1 else parameter.abs().mean()
        parameter.copy_(torch.randn_like(parameter) * spread + parameter.mean())


@method(
    "compare",
    "randomisation",
    better="lower",
    cost="the method 4 times, of 16 images",
    paper="Adebayo et al. 2018, Sanity Checks for Saliency Maps (cascading)",
    random=True,
)
def randomisation(case: Case, *, stages: int = STAGES, images: int = FEW) -> Tensor:
    """How alike the maps stay as the model forgets: the rank correlation of magnitudes, the mean over cascades.

    These initialise a quarter, a half, three quarters and all of the layers anew, the last ones first (more with other
    `stages`). Of the first images.
    """

    def judge(part: Case, again: Again) -> Tensor:
        inputs, chosen = part.query.inputs, list(range(len(part)))
        maps = [again(inputs, chosen, handle=one) for one in _randomised(case, stages)]
        alike = [spearman(part.maps.abs(), one.abs()) for one in maps]
        return torch.stack(alike).nan_to_num(0.0).mean(0)  # a constant map has nothing of the other

    return of_first(case, images, judge)


@method(
    "compare",
    "randomisation_rise",
    better="higher",
    cost="the method once, of 16 images",
    paper="Hedström et al. 2024, Sanity Checks Revisited (efficient MPRT)",
    random=True,
)
def randomisation_rise(case: Case, *, images: int = FEW) -> Tensor:
    """By which share the map's entropy, of a histogram of 100 bins, rises once all layers are initialised anew.

    The efficient form of parameter randomisation, which asks the method once. Of the first images.
    """

    def judge(part: Case, again: Again) -> Tensor:
        *_, last = _randomised(case, STAGES)
        before = _entropy(part.maps)
        return (_entropy(again(part.query.inputs, list(range(len(part))), handle=last)) - before) / before

    return of_first(case, images, judge)


@method(
    "compare",
    "input_invariance",
    better="lower",
    cost="the method once, of 16 images",
    paper="Kindermans et al. 2019, The (Un)reliability of Saliency Methods",
)
def input_invariance(case: Case, *, shift: float = 1.0, images: int = FEW) -> Tensor:
    """How far the map moves, of its own norm, when a constant is added to the input and the model takes it off again.

    So nothing has changed. shift: in units of the model's input. Of the first images.
    """

    def judge(part: Case, again: Again) -> Tensor:
        key = ("shifted", shift)
        if key not in case.shared:
            case.shared[key] = _shifted(case.query.handle, shift)
        moved = again(part.query.inputs + shift, list(range(len(part))), handle=case.shared[key])
        gap: Tensor = (moved - part.maps).flatten(1).norm(dim=1) / part.maps.flatten(1).norm(dim=1)
        return gap

    return of_first(case, images, judge)


@method("compare", "seed_stability", better="higher", cost="the method once, of 16 images")
def seed_stability(case: Case, *, images: int = FEW) -> Tensor:
    """The rank correlation of the maps of two seeds; 1 for a method that draws nothing at random."""

    def judge(part: Case, again: Again) -> Tensor:
        if case.method is not None and not case.method.random:
            return torch.ones(len(part))
        return spearman(part.maps, again(part.query.inputs, list(range(len(part))), seed=case.query.seed + 1))

    return of_first(case, images, judge)


@method("compare", "completeness_gap", better="lower", cost="2 forwards", paper="Sundararajan et al. 2017, Axiomatic")
def completeness_gap(case: Case) -> Tensor:
    """How far the sum of the shares is from the rise of the target's value from zero input to the image, of that rise.

    For methods that share the value out among the inputs.
    """
    if case.attributed is None or (case.method is not None and not case.method.signed):
        raise NotApplicable("the method does not share the target's value out among the inputs")
    inputs = case.query.inputs
    risen = case.once("risen", lambda: case.value_variants(inputs) - case.value_variants(torch.zeros_like(inputs)))
    return (case.attributed.sum((1, 2, 3)) - risen).abs() / risen.abs().clamp(min=1e-12)


def _randomised(case: Case, stages: int) -> list[Handle]:
    key = ("randomised", stages)
    if key not in case.shared:
        case.shared[key] = list(randomised(case.query.handle, case.query.shape, stages, case.query.seed))
    found: list[Handle] = case.shared[key]
    return found


def _shifted(handle: Handle, shift: float) -> Handle:
    """A copy of the model that takes a constant off its input first."""
    module = copy.deepcopy(handle.module)
    forward = module.forward
    module.forward = lambda x, *rest, **named: forward(x - shift, *rest, **named)
    return Handle(module, handle.spec)


def _entropy(maps: Tensor) -> Tensor:
    """`[N]`, in nats, of a histogram of each map's values between its lowest and its highest."""
    found = []
    for values in maps.flatten(1).double():
        counts = torch.histc(values, BINS, float(values.min()), float(values.max()))
        found.append(torch.special.entr(counts / counts.sum()).sum())
    return torch.stack(found).float()
