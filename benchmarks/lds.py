"""How well each method of influence foretells what trainings on half of the images come to.

    python benchmarks/lds.py --out DIR                    every method; the refits are kept in DIR
    python benchmarks/lds.py --out DIR ekfac trak         the rows whose name begins so

The linear datamodelling score (Park et al. 2023, TRAK, section 4): 60 random halves of 1,500 of scikit-learn's digits,
a small CNN trained on each with two seeds. For each of 200 other digits the rank correlation, over the halves, of the
sum of the scores of the images in a half with the margin log(p / (1 - p)) of the label after training on it, averaged
over the seeds; then the mean over the digits. The price is in trainings on all 1,500 images: those that the method
needs beside the model's own, and the processor time of the method over that of one training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from torchloupe_core.methods.influence.spot_check import spearman

TRAIN, TESTS = 1_500, 200
HALVES, SEEDS, AT_ONCE = 60, 2, 10
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 30, 50, 0.05, 0.9, 1e-3
KEPT = (3, 6, 10, 15, 20, 30)  # epochs after which a checkpoint is kept
MODELS = 5  # trainings of an ensemble, the model's own among them

State = dict[str, Tensor]


def network(seed: int) -> nn.Module:
    """14,022 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 28, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(112, 10)),
    )


def trained(images: Tensor, labels: Tensor, subsets: Tensor, seeds: Sequence[int], kept: Sequence[int]) -> list[State]:
    """M models, each on its own subset `[M, m]`, trained side by side; their stacked states after the epochs kept."""
    nets = [network(seed) for seed in seeds]
    parameters, _ = stack_module_state(nets)  # type: ignore[no-untyped-call]
    parameters = {name: one.detach() for name, one in parameters.items()}
    velocity = {name: torch.zeros_like(one) for name, one in parameters.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    base = nets[0]

    def loss(state: State, inputs: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(base, state, (inputs,)), wanted)

    slopes: Callable[..., State] = vmap(grad(loss))
    found = []
    steps = -(-subsets.shape[1] // BATCH)
    for epoch in range(EPOCHS):
        order = torch.stack(
            [row[torch.randperm(len(row), generator=one)] for row, one in zip(subsets, generators, strict=True)]
        )
        for step, chosen in enumerate(order.split(BATCH, 1)):
            rate = RATE * (1 - (epoch * steps + step) / (EPOCHS * steps))
            slope = slopes(parameters, images[chosen][:, :, None], labels[chosen])
            for name, one in parameters.items():
                velocity[name] = MOMENTUM * velocity[name] + slope[name] + DECAY * one
                parameters[name] = one - rate * velocity[name]
        if epoch + 1 in kept:
            found.append(dict(parameters))
    return found


@dataclass(frozen=True)
class Truth:
    """The halves `[M, m]`, and the margins `[M, seeds, T]` of the tests after training on each with each seed."""

    halves: Tensor
    margins: Tensor

    def score(self, scores: Tensor, seeds: int) -> float:
        """The linear datamodelling score of scores `[T, n]`, positive where an image supports."""
        sums = torch.stack([scores[:, half].sum(1) for half in self.halves], 1)  # [T, M]
        actual = self.margins[:, :seeds].mean(1).T
        found = [spearman(a, b) for a, b in zip(sums.double(), actual.double(), strict=True)]
        return sum(found) / len(found)


def margins_of(state: State, images: Tensor, labels: Tensor) -> Tensor:
    """`[M, T]` of stacked models."""
    base = network(0)
    logits = vmap(lambda one: functional_call(base, one, (images,)))(state)  # [M, T, K]
    own = F.one_hot(labels, 10).bool().expand_as(logits)
    return logits[own].view(logits.shape[:2]) - logits.masked_fill(own, -torch.inf).logsumexp(2)


def refits(images: Tensor, labels: Tensor, halves: int, seeds: int, path: Path) -> Truth:
    """The trainings on halves, kept in a file."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(TRAIN, generator=generator)[: TRAIN // 2] for _ in range(halves)])
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept["halves"].equal(chosen) and kept["margins"].shape[1] >= seeds:
            return Truth(chosen, kept["margins"][:, :seeds])
    rows = [(half, seed) for half in range(halves) for seed in range(seeds)]
    found = []
    for begin in range(0, len(rows), AT_ONCE):
        part = rows[begin : begin + AT_ONCE]
        (state,) = trained(images, labels, chosen[[half for half, _ in part]], [seed for _, seed in part], [EPOCHS])
        found.append(margins_of(state, images[TRAIN : TRAIN + TESTS, None], labels[TRAIN : TRAIN + TESTS]))
        print(f"\r{begin + len(part)} of {len(rows)} refits", end="", flush=True)
    print()
    truth = Truth(chosen, torch.cat(found).view(halves, seeds, TESTS))
    torch.save({"halves": truth.halves, "margins": truth.margins}, path)
    return truth
