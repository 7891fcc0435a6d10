"""Metrics that change the image where a map says it matters, and see what the model makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloupe_core.baselines import RADIUS, Baseline, blurred, filling
from torchloupe_core.errors import BadInput
from torchloupe_core.methods.masked import Masked
from torchloupe_core.metrics.case import Case
from torchloupe_core.metrics.imputation import imputed
from torchloupe_core.registry import method

__all__ = ["Ordered", "area", "average_drop", "average_increase", "curve", "deletion", "insertion", "road"]

STEPS = "forwards: as many as the image is wide"
SHARES = tuple(share / 100 for share in range(10, 100, 10))  # of the pixels, removed
PETSIUK = "Petsiuk et al. 2018, RISE: Randomized Input Sampling, section 4.2"
CHATTOPADHAY = "Chattopadhay et al. 2018, Grad-CAM++, section 4.1"


class Ordered:
    """Masks `[n, H, W]` of an image's pixels by rank: from all to none, or from none to all."""

    def __init__(self, values: Tensor, step: int, *, removing: bool) -> None:
        order = values.flatten().argsort(descending=True, stable=True)
        self.ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view(values.shape)
        self.step, self.removing = step, removing
        self._count = -(-len(order) // step) + 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, chosen: slice) -> Tensor:
        reached = torch.arange(*chosen.indices(self._count))[:, None, None] * self.step
        changed = self.ranks < reached
        return ~changed if self.removing else changed


def curve(case: Case, step: int | None, baseline: Baseline, *, removing: bool) -> Tensor:
    """`[N, n]`: the target's value as pixels are removed from the image, or put into the baseline, highest first.

    step: pixels at a time, as many as the image is wide unless given.
    """
    step = case.maps.shape[2] if step is None else step
    if step < 1:
        raise BadInput(f"step is a number of pixels, at least 1; got {step}")
    rows = []
    for index, values in enumerate(case.maps):
        part = case.query.only(index, index + 1)
        place = filling(case.query, baseline).expand_as(case.query.inputs)[index : index + 1]
        masked = Masked(part, Ordered(values, step, removing=removing), place, classes=False)
        for known in masked.scores(0):
            scores = known
        rows.append(scores.float().cpu())
    return torch.stack(rows)


def area(curves: Tensor) -> Tensor:
    """`[N]`: the mean height of curves `[N, n]`, by the trapezoid rule."""
    return (curves.sum(1) - (curves[:, 0] + curves[:, -1]) / 2) / (curves.shape[1] - 1)


@method("compare", "deletion", better="lower", any_scale=True, cost=STEPS, paper=PETSIUK)
def deletion(case: Case, *, step: int | None = None, baseline: Baseline = 0.0) -> Tensor:
    """The area under the target's value as pixels give way to the baseline, the highest first."""
    return area(curve(case, step, baseline, removing=True))


@method("compare", "insertion", better="higher", any_scale=True, cost=STEPS, paper=PETSIUK)
def insertion(case: Case, *, step: int | None = None, baseline: Baseline = None) -> Tensor:
    """The area under the target's value as pixels come into the baseline, the highest first.

    baseline: without it the image blurred, as published with sigma 5 at 224 pixels; where the model still sees the
    target in that, blurred twice as far until it does not. As any baseline of perturbations otherwise.
    """
    place = case.once("blind", lambda: _blind(case)) if baseline is None else baseline
    return area(curve(case, step, place, removing=False))


def _blind(case: Case) -> Tensor:
    """Each image blurred until its target's value is at most half; else its mean colour."""
    inputs, own = case.query.inputs, case.scores()
    found, seen = inputs.mean((2, 3), keepdim=True).expand_as(inputs).clone(), torch.ones(len(inputs), dtype=torch.bool)
    sigma = published = RADIUS * min(inputs.shape[2:])
    while sigma < max(inputs.shape[2:]) / 6 and seen.any():  # beyond, the kernel is wider than the image
        blurry = blurred(inputs, sigma if sigma > published else None)
        hidden = seen & (case.score_variants(blurry) <= own / 2)
        found[hidden], seen = blurry[hidden], seen & ~hidden
        sigma *= 2
    return found


@method(
    "compare",
    "road",
    better="higher",
    any_scale=True,
    cost="forwards: 18",
    paper="Rong et al. 2022, A Consistent and Efficient Evaluation Strategy for Attribution Methods",
    random=True,
)
def road(case: Case, *, shares: tuple[float, ...] = SHARES, noise: float = 0.01) -> Tensor:
    """What is left when the least relevant pixels are removed less what is left without the most relevant, halved.

    Removed pixels become the weighted mean of their neighbours, all at once, plus noise, so that the hole itself says
    little. The mean over `shares` of the pixels.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise BadInput(f"shares are parts of the pixels, each above 0 and below 1; got {shares}")
    ranks = torch.stack([Ordered(values, 1, removing=True).ranks for values in case.maps])
    count, total = ranks[0].numel(), torch.zeros(len(case))
    for share in shares:
        for sign, removed in ((-1, ranks < round(share * count)), (1, ranks >= count - round(share * count))):
            variants = imputed(case.query.inputs, removed.to(case.query.inputs.device), noise, case.query.generator())
            total += sign * case.score_variants(variants)
    return total / (2 * len(shares))


@method("compare", "average_drop", better="lower", any_scale=True, cost="1 forward", paper=CHATTOPADHAY)
def average_drop(case: Case) -> Tensor:
    """The share of the target's value that is lost when the image is shown through its own map; 0 where none is."""
    scores = case.scores()
    return (scores - case.seen_through).clamp(min=0) / scores.abs().clamp(min=1e-12)


@method("compare", "average_increase", better="higher", any_scale=True, cost="1 forward", paper=CHATTOPADHAY)
def average_increase(case: Case) -> Tensor:
    """1 where the target's value is higher when the image is shown through its own map."""
    return (case.seen_through > case.scores()).float()
