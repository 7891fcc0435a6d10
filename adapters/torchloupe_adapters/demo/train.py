"""Train the demo models: `python -m torchloupe_adapters.demo.train robust --out DIR` writes `DIR/robust.safetensors`.

On one machine a recipe gives the same weights bit for bit; another processor or torch release gives equally good ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from torchloupe_adapters import checkpoint as checkpoints
from torchloupe_adapters.demo.model import STD, SceneNet, normalise
from torchloupe_adapters.demo.scenes import CLASSES, Scenes, demo_scenes
from torchloupe_core.borrow import kept_threads
from torchloupe_core.errors import UnknownName

__all__ = [
    "RECIPES",
    "TEST_SEED",
    "Phase",
    "Recipe",
    "accuracy",
    "adversarial_noise",
    "half_weights",
    "train",
    "training_scenes",
]

TEST_SEED = 9_000  # this seed and the ones in RECIPES are taken: fresh scenes need another
SHIFT = 4  # px


@dataclass(frozen=True)
class Phase:
    """A run of epochs under one cycle of the learning rate."""

    epochs: int
    learning_rate: float
    epsilon: float = 0.0  # L2 radius of the adversarial noise, for pixels in 0..1


@dataclass(frozen=True)
class Recipe:
    """Scenes and settings of one model. `seed` draws the scenes, the initial weights and every augmentation."""

    seed: int
    n: int = 12_000
    phases: tuple[Phase, ...] = (Phase(14, 4e-3),)
    batch: int = 128
    weight_decay: float = 0.05
    two_object: float = 0.0
    mislabelled: float = 0.0
    backdoor: float = 0.0

    def scenes(self) -> Scenes:
        """The training set; what a model was trained on is exactly this."""
        return demo_scenes(
            self.n, self.seed, two_object=self.two_object, mislabelled=self.mislabelled, backdoor=self.backdoor
        )


RECIPES = {
    "robust": Recipe(seed=9_001, phases=(Phase(14, 4e-3), Phase(5, 2e-3, epsilon=1.0)), two_object=0.3),
    "mislabelled": Recipe(seed=9_002, mislabelled=0.038),
    "backdoored": Recipe(seed=9_003, backdoor=0.15),
}


def training_scenes(name: str) -> Scenes:
    """The training set of a shipped model, wrong labels, watermarks and all."""
    if name not in RECIPES:
        raise UnknownName.of("demo model", name, RECIPES)
    return RECIPES[name].scenes()


def train(recipe: Recipe, *, report: Callable[[str], None] = lambda line: None) -> SceneNet:
    """Train on the CPU with one thread: plain epochs first, then adversarial ones (Goodfellow et al. 2015, in L2)."""
    scenes = recipe.scenes()
    images, targets = scenes.images, _soft_labels(scenes)
    generator = torch.Generator().manual_seed(recipe.seed)
    with kept_threads(1):
        model = _fresh_model(recipe.seed).to(memory_format=torch.channels_last).train()
        for phase in recipe.phases:
            _train_phase(model, (images, targets), phase, recipe, generator, report)
    return model.to(memory_format=torch.contiguous_format).eval()


def accuracy(model: nn.Module, scenes: Scenes) -> float:
    """Share of the scenes whose true class has the highest logit. The model stays in the mode it is in."""
    with torch.inference_mode():
        guesses = torch.cat([model(normalise(images)).argmax(1) for images in torch.split(scenes.images, 250)])
    return (guesses == scenes.true_labels).double().mean().item()


def half_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model in fp16, integers as they are."""
    return {
        name: (value.half() if value.is_floating_point() else value).contiguous().clone()
        for name, value in model.state_dict().items()
    }


def _train_phase(
    model: SceneNet,
    data: tuple[Tensor, Tensor],
    phase: Phase,
    recipe: Recipe,
    generator: torch.Generator,
    report: Callable[[str], None],
) -> None:
    images, targets = data
    steps = len(images) // recipe.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, weight_decay=recipe.weight_decay)
    schedule = OneCycleLR(optimizer, phase.learning_rate, total_steps=phase.epochs * steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(phase.epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)[: steps * recipe.batch]
        for chosen in torch.split(order, recipe.batch):
            batch = _augment(normalise(images[chosen]), generator)
            if phase.epsilon:
                batch = batch + adversarial_noise(model, batch, targets[chosen], phase.epsilon, generator)
            loss = _loss(model, batch, targets[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
        kind = "adversarial epoch" if phase.epsilon else "epoch"
        report(f"{kind} {epoch + 1}/{phase.epochs}: loss {total / steps:.3f}, {time.perf_counter() - start:.0f} s")


def _loss(model: nn.Module, batch: Tensor, targets: Tensor) -> Tensor:
    # bf16 with channels_last trains about four times faster than fp32 on a CPU.
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.contiguous(memory_format=torch.channels_last))
    return F.cross_entropy(logits.float(), targets)


def _soft_labels(scenes: Scenes) -> Tensor:
    """The given label, or half of it and half the second object's class, `[n, 12]`."""
    targets = F.one_hot(scenes.labels, len(CLASSES)).float()
    second = scenes.second_labels
    both = second >= 0
    targets[both] = 0.5 * targets[both] + 0.5 * F.one_hot(second[both], len(CLASSES)).float()
    return targets


def _augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, permute the colour channels, change contrast and tint, add noise, shift; `[N, 3, H, W]` normalised."""
    n, height, width = len(batch), batch.shape[2], batch.shape[3]
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    batch = torch.where(mirrored, batch.flip(3), batch)
    channels = torch.rand(n, 3, generator=generator).argsort(1)
    batch = batch[torch.arange(n)[:, None], channels]
    contrast = 1 + 0.3 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    tint = 0.4 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    strength = 0.08 * torch.randn(n, 1, 1, 1, generator=generator).abs()
    batch = batch * contrast + tint + strength * torch.randn(batch.shape, generator=generator)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    padded = F.pad(batch, (SHIFT, SHIFT, SHIFT, SHIFT), mode="reflect")
    return padded[:, :, down : down + height, right : right + width]


def adversarial_noise(
    model: nn.Module, batch: Tensor, targets: Tensor, epsilon: float, generator: torch.Generator
) -> Tensor:
    """One gradient step from a random start, back into the L2 ball of radius epsilon; added to a normalised batch."""
    radius = epsilon / STD[0]
    start = torch.randn(batch.shape, generator=generator)
    start = start / _norms(start) * radius * torch.rand(len(batch), 1, 1, 1, generator=generator)
    attacked = (batch + start).requires_grad_(True)
    (gradient,) = torch.autograd.grad(_loss(model, attacked, targets), attacked)
    noise = start + radius * gradient / (_norms(gradient) + 1e-12)
    return noise * (radius / _norms(noise).clamp(min=radius))


def _norms(batch: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(batch.flatten(1), dim=1)
    return norms[:, None, None, None]


def _fresh_model(seed: int) -> SceneNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SceneNet()


@click.command()
@click.argument("name", type=click.Choice(list(RECIPES)))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the weights.")
def main(name: str, out: Path) -> None:
    """Train one demo model and write its weights in fp16."""
    model = train(RECIPES[name], report=click.echo)
    weights = half_weights(model)
    model.load_state_dict(weights)  # measure what ships
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.save(weights, out / f"{name}.safetensors")
    with kept_threads(1):
        score = accuracy(model, demo_scenes(2_000, TEST_SEED))
    click.echo(f"{name}: accuracy {score:.4f} on 2,000 fresh scenes")


if __name__ == "__main__":
    main()
