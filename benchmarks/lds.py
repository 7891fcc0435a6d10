"""How well each method of influence foretells what trainings on half of the images come to.

    python benchmarks/lds.py --out DIR                 every method, a quarter of an hour; the refits are kept in DIR
    python benchmarks/lds.py --out DIR ekfac trak      the rows whose name begins so

The linear datamodelling score (Park et al. 2023, TRAK, section 4): 60 random halves of 1,500 of scikit-learn's digits,
a small CNN trained on each with two seeds. For each of 200 other digits the rank correlation, over the halves, of the
sum of the scores of the images in a half with the margin log(p / (1 - p)) of the label after training on it, averaged
over the seeds; then the mean over the digits. A second column has eight seeds, which leaves less of the seeds' noise
in the margins; under the table is what other trainings on the same halves foretell. The price is in trainings on all
1,500 images: those that a method needs beside the model's own, and the processor time of the method over that of one.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_adapters.sklearn import digits
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.methods.influence.spot_check import spearman

TRAIN, TESTS = 1_500, 200
HALVES, SEEDS, MORE_SEEDS, AT_ONCE = 60, 2, 8, 10
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 30, 50, 0.05, 0.9, 1e-3
KEPT = (3, 6, 10, 15, 20, 30)  # epochs after which a checkpoint is kept
MODELS = 10  # trainings of an ensemble, the model's own among them

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


# -- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """The models asked about, and the data: states after the epochs kept, each stacked over trainings."""

    states: Sequence[State]
    train: TensorDataset
    test: TensorDataset

    def at(self, epoch: int = EPOCHS, training: int = 0) -> tl.Handle:
        """One training's model after an epoch."""
        net = network(0)
        net.load_state_dict({name: one[training] for name, one in self.states[KEPT.index(epoch)].items()})
        return tl.wrap(net, input_size=(1, 8, 8))

    def several(self, count: int) -> list[tl.Handle]:
        """The models of several trainings."""
        return [self.at(training=training) for training in range(count)]

    @property
    def along(self) -> list[tl.Handle]:
        """One training's model after each of the epochs kept."""
        return [self.at(epoch) for epoch in KEPT]


@dataclass(frozen=True)
class Row:
    """What to ask. trainings: beside the model's own."""

    name: str
    options: dict[str, Any]
    trainings: int = 0


def rows(models: Models) -> Iterator[Row]:
    """Every method, the whole network unless it is of the head alone."""
    whole: dict[str, Any] = {"layers": "all"}
    for count in (1, 5, MODELS):
        over = {} if count == 1 else {"checkpoints": models.several(count)}
        text = "" if count == 1 else f", {count} models"
        yield Row(f"ekfac{text}", {**whole, "method": "ekfac", **over}, count - 1)
        yield Row(f"trak{text}", {**whole, "method": "trak", **over}, count - 1)
    yield Row("kfac", {**whole, "method": "kfac"})
    yield Row("ekfac, 6 checkpoints", {**whole, "method": "ekfac", "checkpoints": models.along})
    yield Row("ekfac, weight_decay given", {**whole, "method": "ekfac", "weight_decay": DECAY})
    yield Row("trak, 6 checkpoints", {**whole, "method": "trak", "checkpoints": models.along})
    yield Row("tracin, 6 checkpoints", {**whole, "method": "tracin", "checkpoints": models.along})
    yield Row("gradient_dot", {**whole, "method": "gradient_dot"})
    yield Row("arnoldi", {**whole, "method": "arnoldi", "damping": 1e-4})
    yield Row("cg", {**whole, "method": "cg", "damping": 1e-2, "tolerance": 1e-2})
    yield Row("lissa", {**whole, "method": "lissa", "damping": 1e-1, "tolerance": 0.1, "depth": 40})
    yield Row("head: exact", {"method": "exact"})
    yield Row("head: exact, by a step of Newton's", {"method": "exact", "removal": "newton"})
    yield Row("head: feature_cosine", {"method": "feature_cosine"})
    yield Row("head: representer", {"method": "representer", "weight_decay": DECAY})
    yield Row("captum.naive, the head", {"method": "captum.naive"})
    yield Row("captum.arnoldi", {**whole, "method": "captum.arnoldi", "damping": 1e-4})
    yield Row("captum.tracin, 6 checkpoints", {**whole, "method": "captum.tracin", "checkpoints": models.along})
    yield Row("captum.tracin_fast, 6 checkpoints", {"method": "captum.tracin_fast", "checkpoints": models.along})
    yield Row("kronfluence.ekfac", {**whole, "method": "kronfluence.ekfac", "damping": 1e-4})
    yield Row("dattri.arnoldi", {**whole, "method": "dattri.arnoldi", "damping": 1e-4})
    yield Row("dattri.datainf", {**whole, "method": "dattri.datainf", "damping": 1e-2})
    yield Row("dattri.tracin, 6 checkpoints", {**whole, "method": "dattri.tracin", "checkpoints": models.along})
    yield Row("dattri.trak", {**whole, "method": "dattri.trak"})


def measured(row: Row, models: Models, truth: Truth, training: float) -> str:
    """A line of the table."""
    begun = time.process_time()
    try:
        found = tl.influence(models.at(), models.train, models.test, check=0, progress=False, **row.options)
    except (MissingDependency, BadInput, NotApplicable) as error:
        return f"| {row.name} | - | - | {str(error).splitlines()[0][:80]} |"
    price = row.trainings + (time.process_time() - begun) / training
    few, many = (truth.score(found.scores, seeds) for seeds in (SEEDS, MORE_SEEDS))
    return f"| {row.name} | {few:.3f} | {many:.3f} | {price:.1f} |"


def agreement(truth: Truth, seeds: int) -> float:
    """What margins of other seeds would score: the most that noise leaves, for twice as many trainings in all."""
    one, other = (truth.margins[:, part].mean(1).T.double() for part in (slice(0, seeds), slice(seeds, 2 * seeds)))
    found = [spearman(a, b) for a, b in zip(one, other, strict=True)]
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of row names")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps the refits")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    images, labels = (torch.from_numpy(one) for one in digits())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    truth = refits(images, labels, HALVES, MORE_SEEDS, asked.out / "refits.pt")
    begun, every = time.process_time(), torch.arange(TRAIN).expand(MODELS, -1)
    states = trained(images, labels, every, range(100, 100 + MODELS), KEPT)
    training = (time.process_time() - begun) / MODELS
    parts = (slice(TRAIN), slice(TRAIN, TRAIN + TESTS))
    train, test = (TensorDataset(images[part, None], labels[part]) for part in parts)
    models = Models(states, train, test)
    right = (margins_of(states[-1], *(one[parts[1]] for one in (images[:, None], labels))) > 0).float().mean()
    print(f"torch {torch.__version__}, one core; a training takes {training:.1f} s; {right:.1%} of tests right\n")
    print(f"| method | LDS, {SEEDS} seeds | {MORE_SEEDS} seeds | price |\n|---|---|---|---|")
    for row in rows(models):
        if not asked.names or any(row.name.startswith(name) for name in asked.names):
            print(measured(row, models, truth, training), flush=True)
    for seeds, others in ((SEEDS, HALVES * SEEDS), (MORE_SEEDS // 2, HALVES * MORE_SEEDS // 2)):
        text = f"{others} trainings on the same halves, other seeds"
        print(f"| {text} | {agreement(truth, seeds):.3f} | | {others / 2:.0f} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
