"""How well each method of influence foretells what trainings on half of the images come to.

    python benchmarks/lds.py                 every method, a quarter of an hour; the refits are kept in out/lds
    python benchmarks/lds.py ekfac trak      the rows whose name begins so
    python benchmarks/lds.py --out DIR       the refits are kept there

The linear datamodelling score (Park et al. 2023, TRAK, section 4): 60 random halves of 1,500 of scikit-learn's digits,
a small CNN trained on each with two seeds. For each of 200 other digits the rank correlation, over the halves, of the
sum of the scores of the images in a half with the margin log(p / (1 - p)) of the label after training on it, averaged
over the seeds; then the mean over the digits. Beside it stands the same with eight seeds, which leaves less of the
seeds' noise in the margins; the last rows are what other trainings on the same halves foretell. The price is in
trainings on all 1,500 images: those that a method needs beside the model's own, and the processor time of the method
over that of one.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Row, Rows, asked, run, seconds
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_adapters.sklearn import digits
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.methods.influence.spot_check import spearman

TRAIN, TESTS = 1_500, 200
HALVES, SEEDS, MORE_SEEDS, AT_ONCE = 60, 2, 8, 10
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 30, 50, 0.05, 0.9, 1e-3
KEPT = (3, 6, 10, 15, 20, 30)  # epochs after which a checkpoint is kept
MODELS = 10  # trainings of the largest ensemble, the model's own among them

State = dict[str, Tensor]


def small_network(seed: int) -> nn.Module:
    """14,022 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 28, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(112, 10)),
    )


def trained(images: Tensor, labels: Tensor, subsets: Tensor, seeds: Sequence[int], kept: Sequence[int]) -> list[State]:
    """M models, each on its own subset `[M, m]`, trained side by side; their stacked states after the epochs kept."""
    nets = [small_network(seed) for seed in seeds]
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
    base = small_network(0)
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
        print(f"    {begin + len(part)} of {len(rows)} refits", flush=True)
    truth = Truth(chosen, torch.cat(found).view(halves, seeds, TESTS))
    torch.save({"halves": truth.halves, "margins": truth.margins}, path)
    return truth


# -- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """The models asked about, and the data: states after the epochs kept, each stacked over trainings."""

    states: Sequence[State]
    train: TensorDataset
    test: TensorDataset
    truth: Truth
    training: float  # seconds of processor time

    def at(self, epoch: int = EPOCHS, training: int = 0) -> tl.Handle:
        """One training's model after an epoch."""
        net = small_network(0)
        net.load_state_dict({name: one[training] for name, one in self.states[KEPT.index(epoch)].items()})
        return tl.wrap(net, input_size=(1, 8, 8))

    def several(self, count: int) -> list[tl.Handle]:
        """The models of several trainings."""
        return [self.at(training=training) for training in range(count)]

    @property
    def along(self) -> list[tl.Handle]:
        """One training's model after each of the epochs kept."""
        return [self.at(epoch) for epoch in KEPT]


ALONG = "along"  # in place of checkpoints: a training's own
METHODS: dict[str, dict[str, Any]] = {
    "ekfac": {"layers": "all", "method": "ekfac"},
    "trak": {"layers": "all", "method": "trak"},
    "ekfac, 5 models": {"layers": "all", "method": "ekfac", "checkpoints": 5},
    "trak, 5 models": {"layers": "all", "method": "trak", "checkpoints": 5},
    "ekfac, 10 models": {"layers": "all", "method": "ekfac", "checkpoints": MODELS},
    "trak, 10 models": {"layers": "all", "method": "trak", "checkpoints": MODELS},
    "kfac": {"layers": "all", "method": "kfac"},
    "ekfac, 6 checkpoints": {"layers": "all", "method": "ekfac", "checkpoints": ALONG},
    "ekfac, weight_decay given": {"layers": "all", "method": "ekfac", "weight_decay": DECAY},
    "trak, 6 checkpoints": {"layers": "all", "method": "trak", "checkpoints": ALONG},
    "tracin, 6 checkpoints": {"layers": "all", "method": "tracin", "checkpoints": ALONG},
    "gradient_dot": {"layers": "all", "method": "gradient_dot"},
    "arnoldi": {"layers": "all", "method": "arnoldi", "damping": 1e-4},
    "cg": {"layers": "all", "method": "cg", "damping": 0.01, "tolerance": 0.01},
    "lissa": {"layers": "all", "method": "lissa", "damping": 0.1, "tolerance": 0.1, "depth": 40},
    "head: exact": {"method": "exact"},
    "head: exact, by a step of Newton's": {"method": "exact", "removal": "newton"},
    "head: feature_cosine": {"method": "feature_cosine"},
    "head: representer": {"method": "representer", "weight_decay": DECAY},
    "captum.naive, the head": {"method": "captum.naive"},
    "captum.arnoldi": {"layers": "all", "method": "captum.arnoldi", "damping": 1e-4},
    "captum.tracin, 6 checkpoints": {"layers": "all", "method": "captum.tracin", "checkpoints": ALONG},
    "captum.tracin_fast, 6 checkpoints": {"method": "captum.tracin_fast", "checkpoints": ALONG},
    "kronfluence.ekfac": {"layers": "all", "method": "kronfluence.ekfac", "damping": 1e-4},
    "dattri.arnoldi": {"layers": "all", "method": "dattri.arnoldi", "damping": 1e-4},
    "dattri.datainf": {"layers": "all", "method": "dattri.datainf", "damping": 0.01},
    "dattri.tracin, 6 checkpoints": {"layers": "all", "method": "dattri.tracin", "checkpoints": ALONG},
    "dattri.trak": {"layers": "all", "method": "dattri.trak"},
}


def judged(given: argparse.Namespace, options: dict[str, Any]) -> Rows:
    """A method's score with few seeds; the note has it with more, and the price."""
    models, checkpoints, others = trainings(given.out), options.get("checkpoints"), 0
    if checkpoints is not None:
        options = {**options, "checkpoints": models.along if checkpoints == ALONG else models.several(checkpoints)}
        others = 0 if checkpoints == ALONG else checkpoints - 1
    begun = time.process_time()
    try:
        found = tl.influence(models.at(), models.train, models.test, check=0, progress=False, **options)
    except (BadInput, NotApplicable) as error:
        yield Row("", None, note=str(error).splitlines()[0][:80])
        return
    price = others + (time.process_time() - begun) / models.training
    few, many = (models.truth.score(found.scores, seeds) for seeds in (SEEDS, MORE_SEEDS))
    yield Row("", few, note=f"{many:.3f} with {MORE_SEEDS} seeds, price {price:.1f}")


def noise(given: argparse.Namespace) -> Rows:
    """What margins of other seeds would score: the most that noise leaves, for twice as many trainings in all."""
    margins = trainings(given.out).truth.margins
    for seeds in (SEEDS, MORE_SEEDS // 2):
        one, other = (margins[:, part].mean(1).T.double() for part in (slice(seeds), slice(seeds, 2 * seeds)))
        found = [spearman(a, b) for a, b in zip(one, other, strict=True)]
        yield Row(f"{seeds} for {seeds}", sum(found) / len(found), note=f"price {HALVES * seeds / 2:.0f}")


@functools.cache
def trainings(out: str) -> Models:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = (torch.from_numpy(one) for one in digits())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    truth = refits(images, labels, HALVES, MORE_SEEDS, folder / "refits.pt")
    every, states = torch.arange(TRAIN).expand(MODELS, -1), []
    taken = seconds(lambda: states.extend(trained(images, labels, every, range(100, 100 + MODELS), KEPT)))
    parts = (slice(TRAIN), slice(TRAIN, TRAIN + TESTS))
    train, test = (TensorDataset(images[part, None], labels[part]) for part in parts)
    right = (margins_of(states[-1], *test.tensors) > 0).float().mean()
    print(f"    a training takes {taken / MODELS:.1f} s; {right:.1%} of tests right", flush=True)
    return Models(states, train, test, truth, taken / MODELS)


def parts(given: argparse.Namespace) -> dict[str, Callable[[], Rows]]:
    methods = {name: partial(judged, given, options) for name, options in METHODS.items()}
    return {**methods, f"other trainings on the same {HALVES} halves, seeds": partial(noise, given)}


if __name__ == "__main__":
    given = asked(__doc__, out="out/lds")
    run(parts(given), given)
