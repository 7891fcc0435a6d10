"""Training a network to put pictures into styles, with checkpoints from which it goes on as if never stopped.

What is shown at a step, and in which style, depends on the seed and the number of the step alone; so a checkpoint is
the weights, what the optimiser remembers, and that number.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torchloupe_core.adam import Adam
from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput, StoreError
from torchloupe_core.handle import Handle
from torchloupe_core.regularizers import TotalVariation
from torchloupe_core.results import UNREADABLE, write_whole
from torchloupe_core.style import Grams, apart, gram
from torchloupe_core.stylenet import StyleNet
from torchloupe_core.watch import Watch

__all__ = ["Training", "digest"]

SEEDS = 2**63
STRIDE = 1_000_003  # between the seeds of the steps of two runs
TINY = 1e-12


@dataclass
class Training:
    """A network under training.

    images: a data set of model inputs; grams: of each layer `[S, C, C]`, one for each style; content: the layer that
    should see what it saw. weights: of content, style and total variation. settings: what a checkpoint has to agree
    with. report: told of each step.
    """

    handle: Handle
    network: StyleNet
    images: DataSet
    grams: Grams
    content: str
    weights: tuple[float, float, float]
    batch: int
    lr: float
    seed: int
    settings: Mapping[str, Any]
    report: Callable[..., None] = lambda done, total, note="": None
    step: int = 0
    stopped: str = ""
    losses: list[Tensor] = field(default_factory=list)  # [3] each

    def __post_init__(self) -> None:
        if self.images.streams or not len(self.images):
            raise BadInput("a stylizer is trained on images that can be asked for by number; a stream has no order")
        self.parameters = list(self.network.parameters())
        self.optimizer = Adam(self.parameters, self.lr)

    def run(self, steps: int, *, checkpoint: Path | None, every: int, interruptible: bool) -> None:
        """Trains until so many steps are done in all; writes the checkpoint now and then, at the end and on Ctrl-C."""
        if checkpoint is not None and checkpoint.exists():
            self.go_on(checkpoint)
        begun = self.step
        shape = self.handle.input_shape if self.handle.spec.input_size else self.read(0).shape
        try:
            with self.handle.watch(*dict.fromkeys((*self.grams, self.content)), shape=_shape(shape)) as watch:
                while self.step < steps and not self.stopped:
                    self._make_step(watch)
                    self.report(self.step, steps, f"style {self.losses[-1][1]:.3g}" if self.losses else "")
                    if checkpoint is not None and self.step % every == 0:
                        self.keep(checkpoint)
        except KeyboardInterrupt:
            if checkpoint is not None and self.step > begun:
                self.keep(checkpoint)
            if not interruptible or self.step == 0:
                raise
            self.stopped = f"interrupted after step {self.step}"
        if checkpoint is not None and self.step > begun:
            self.keep(checkpoint)

    def _make_step(self, watch: Watch) -> None:
        images, mix = self._batch()
        with torch.no_grad():
            watch(self._inputs(images))
            given = watch.map(self.content).detach().float()
        with torch.enable_grad():
            made = self.network(images, mix)
            watch(self._inputs(made))
            parts = torch.stack([self._far(watch, given), self._unlike(watch, mix), _variation(made)])
            total = (parts * parts.new_tensor(self.weights)).sum()
            gradients = torch.autograd.grad(total, self.parameters)
        finite = bool(total.isfinite()) and all(bool(one.sum().isfinite()) for one in gradients)
        if not finite:
            if self.step == 0:
                raise BadInput("the losses or their gradients are NaN or infinite at the first step")
            self.stopped = f"the losses or their gradients are NaN or infinite after step {self.step}"
            return
        self.optimizer.step(gradients)
        self.losses.append(parts.detach().float().cpu())
        self.step += 1

    def _far(self, watch: Watch, given: Tensor) -> Tensor:
        found = watch.map(self.content).float()
        scale = given.square().mean((1, 2, 3)).clamp(min=TINY)
        return ((found - given).square().mean((1, 2, 3)) / scale).mean()

    def _unlike(self, watch: Watch, mix: Tensor) -> Tensor:
        which = mix.argmax(1)
        shares = [apart(gram(watch.map(name).float()), each[which].to(mix)) for name, each in self.grams.items()]
        return torch.stack(shares).mean()

    def _inputs(self, images: Tensor) -> Tensor:
        return self.handle.spec.normalised(images).to(self.handle.dtype)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The images of this step as pixels, and the style of each as `[N, S]`."""
        source = torch.Generator().manual_seed((self.seed * STRIDE + self.step) % SEEDS)
        n, first = len(self.images), self.step * self.batch
        order = {epoch: self._order(epoch) for epoch in {first // n, (first + self.batch - 1) // n}}
        places = [order[at // n][at % n] for at in range(first, first + self.batch)]
        inputs = torch.stack([self.read(place) for place in places])
        count = len(next(iter(self.grams.values())))
        which = torch.randint(count, (self.batch,), generator=source)
        pixels = self.handle.spec.pixels(inputs.to(self.handle.device, torch.float32))
        return pixels, torch.eye(count)[which].to(self.handle.device)

    def _order(self, epoch: int) -> list[int]:
        source = torch.Generator().manual_seed((self.seed + epoch * STRIDE) % SEEDS)
        found: list[int] = torch.randperm(len(self.images), generator=source).tolist()
        return found

    def read(self, place: int) -> Tensor:
        """The image at a place, or the next one that can be read."""
        order = self.images.order
        for other in range(len(self.images)):
            sample = self.images.read(order[(place + other) % len(self.images)] if order is not None else place)
            if sample.inputs is not None:
                return sample.inputs
        raise BadInput(f"none of the {len(self.images)} images can be read; the last: {sample.error}")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def keep(self, path: Path) -> None:
        """Writes all there is to go on from, whole or not at all. Raises `StoreError`."""
        facts = {"kind": "stylizer checkpoint", "step": self.step, "settings": dict(self.settings)}
        memory = parameters_to_vector([one.contiguous() for one in self.optimizer.kept()])
        buffer = io.BytesIO()
        np.savez(
            buffer,
            allow_pickle=False,
            facts=np.array(json.dumps(facts)),
            weights=parameters_to_vector(self.parameters).detach().cpu().numpy(),
            memory=memory.detach().cpu().numpy(),
            losses=torch.stack(self.losses).numpy() if self.losses else np.zeros((0, 3), np.float32),
        )
        write_whole(path, buffer.getvalue())

    def go_on(self, path: Path) -> None:
        """Takes up a checkpoint. Raises `StoreError` for a file that is none, `BadInput` for one of other settings."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                facts = json.loads(str(stored["facts"]))
                weights, memory, losses = (torch.from_numpy(stored[name]) for name in ("weights", "memory", "losses"))
            step, settings = int(facts["step"]), dict(facts["settings"])
        except (*UNREADABLE, AttributeError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is no checkpoint of a stylizer: {error}") from error
        for name, value in json.loads(json.dumps(dict(self.settings))).items():
            if settings.get(name) != value:
                raise BadInput(
                    f"{path} was trained with {name}={settings.get(name)!r}, this run has {value!r}; give another "
                    "checkpoint= or the same settings"
                )
        device = self.handle.device
        with torch.no_grad():
            vector_to_parameters(weights.to(device), self.parameters)
        parts = torch.split(memory.to(device), [one.numel() for one in self.parameters] * 2)
        kept = [part.view_as(one).clone() for part, one in zip(parts, self.parameters * 2, strict=True)]
        self.optimizer.go_on(step, kept)
        self.step, self.losses = step, list(losses)


def digest(images: Sequence[Tensor]) -> str:
    """Of what pictures show, in 8 bits."""
    found = hashlib.sha256()
    for image in images:
        found.update(str(list(image.shape)).encode())
        found.update((image.detach().cpu() * 255).round().byte().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _variation(images: Tensor) -> Tensor:
    return TotalVariation(1.0, 2.0).penalty(images).mean()


def _shape(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width
