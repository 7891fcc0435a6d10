"""A small generator of scenes, for learned priors: from what the last layer of the demo model sees to an image.

It was trained to undo the model, as the generators of Nguyen et al. 2016 (DGN-AM) undo a classifier's features:
`python -m torchloupe_adapters.demo.generator --out DIR` writes `DIR/generator.safetensors`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchloupe_adapters import checkpoint as checkpoints
from torchloupe_adapters.demo.model import normalise
from torchloupe_adapters.demo.scenes import demo_scenes
from torchloupe_core.handle import Handle
from torchloupe_core.prior import Prior

__all__ = ["CODE", "SceneGenerator", "codes", "demo_prior", "train"]

CODE = (128, 4, 4)  # the demo model's layer4, averaged to four by four places
WIDTHS = (96, 64, 48, 32)
SEED, SCENES, EPOCHS, BATCH, RATE = 9_101, 6_000, 12, 32, 1e-3
COARSE, FINE = 0.05, 0.05  # weights of the model's own view of the difference, at its second and third stage
LARGEST = 3.0  # about the 99.9% quantile of the codes of scenes


class SceneGenerator(nn.Module):
    """Codes `[N, 128, 4, 4]`, not below zero, to images `[N, 3, 64, 64]` in [0, 1]: 211,843 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = CODE[0]
        for width in WIDTHS:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width)]
            layers += [nn.LeakyReLU(0.2)]
            before = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 3, 3, padding=1))

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes).sigmoid()  # type: ignore[no-any-return]


def codes(model: Handle, inputs: Tensor) -> Tensor:
    """The codes `[N, 128, 4, 4]` of model inputs."""
    with model.watch("layer4") as watch:
        watch(inputs)
        return F.adaptive_avg_pool2d(watch.map("layer4"), CODE[1:])


def demo_prior(**options: object) -> Prior:
    """The generator as a prior for the demo model. options: of `Prior`."""
    generator = SceneGenerator().eval()
    checkpoints.load_into(generator, Path(__file__).parent / "weights" / "generator.safetensors")
    return Prior(generator, CODE, **{"sd": 0.1, "limits": (0.0, LARGEST), **options})  # type: ignore[arg-type]


def train(model: Handle, *, report: Callable[[str], None] = lambda line: None) -> SceneGenerator:
    """On the CPU: the pixels' mean absolute difference, and that of what the model sees of the two images."""
    images = demo_scenes(SCENES, SEED).images
    with model.borrow():
        known = torch.cat([codes(model, normalise(part)) for part in torch.split(images, 250)])
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(SEED)
            generator = SceneGenerator().to(memory_format=torch.channels_last)
            _fit(generator, model, images, known, report)
    return generator.to(memory_format=torch.contiguous_format).eval()


def _fit(
    generator: SceneGenerator, model: Handle, images: Tensor, known: Tensor, report: Callable[[str], None]
) -> None:
    parameters, steps = list(generator.parameters()), len(images) // BATCH
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    begun = time.perf_counter()
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.split(torch.randperm(len(images))[: steps * BATCH], BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                made = generator(known[chosen].contiguous(memory_format=torch.channels_last))
                loss = _loss(model, made.float(), images[chosen])
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            total += loss.item()
        report(f"epoch {epoch + 1}/{EPOCHS}: loss {total / steps:.4f}, {time.perf_counter() - begun:.0f} s")


def _loss(model: Handle, made: Tensor, images: Tensor) -> Tensor:
    truth = images.float() / 255
    with model.watch("layer2", "layer3") as watch:
        with torch.no_grad():
            watch(model.spec.normalised(truth))
            expected = [watch[name] for name in ("layer2", "layer3")]
        watch(model.spec.normalised(made))
        apart = [
            weight * (watch[name] - seen).abs().mean()
            for weight, name, seen in zip((COARSE, FINE), ("layer2", "layer3"), expected, strict=True)
        ]
    return (made - truth).abs().mean() + sum(apart)


def main() -> None:
    from torchloupe_adapters.demo import load
    from torchloupe_adapters.demo.train import half_weights

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    generator = train(load(), report=lambda line: print(line, flush=True))  # noqa: T201
    checkpoints.save(half_weights(generator), out / "generator.safetensors")


if __name__ == "__main__":
    main()
