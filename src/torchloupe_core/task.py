"""What is to be made, as an engine sees it, and what engines make."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from torchloupe_core.adam import Adam
from torchloupe_core.canvas import Canvas, Draw
from torchloupe_core.descent import Descent
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.parametrizations import Parametrization
from torchloupe_core.regularizers import Regularizer
from torchloupe_core.targets import Bound
from torchloupe_core.terms import Term
from torchloupe_core.transforms import Transform
from torchloupe_core.watch import Watch

__all__ = ["Made", "Read", "Task"]

Read = Literal["auto", "pre", "post"]


@dataclass(frozen=True)
class Task:
    """Images to make, one for each bound target, as an engine sees them. The model is already borrowed.

    shape: (C, H, W) of the images; shown: (h, w) of what the network sees. begin: images `[n, C, H, W]` in [0, 1] to
    start from instead of noise. terms: penalties on activations; reference: images `[n, C, H, W]` they compare with;
    aim: what the target itself counts beside them. first: the number of the first of these images among
    all that were asked for, which its random numbers depend on. redirect: whether a gradient that is zero is replaced.
    early: the same targets read before their ReLU, which count too in the first `warm` steps, less and less, so that
    positions where a unit is off take part at first.
    optimizer: what moves the numbers, made of them and of lr. tile: (h, w) of the parts that images are shown in, one
    after the other, so that the memory of a step is that of one part; None shows them whole.
    snapshots: the steps after which images are kept. precision: of autocast, if any. compile: whether forward and
    backward pass are compiled, or the backend that does it. report: told of each step.
    """

    handle: Handle
    targets: Sequence[Bound]
    shape: Shape
    shown: tuple[int, int]
    parametrization: Parametrization
    transforms: Sequence[Transform] = ()
    regularizers: Sequence[Regularizer] = ()
    terms: Sequence[Term] = ()
    reference: Tensor | None = None
    aim: float = 1.0
    begin: Tensor | None = None
    steps: int = 512
    lr: float = 0.05
    optimizer: Callable[[Sequence[Tensor], float], Descent] = Adam
    tile: tuple[int, int] | None = None
    seed: int = 0
    first: int = 0
    redirect: bool = True
    early: Sequence[Bound] = ()
    warm: int = 0
    snapshots: tuple[int, ...] = ()
    precision: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    compile: bool | str = False
    interruptible: bool = False
    report: Callable[[int, int, str], None] = lambda done, total, note: None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers optimised: single precision, or double where the model computes in it."""
        return torch.promote_types(self.handle.dtype, torch.float32)

    @property
    def seen(self) -> Shape:
        """(C, h, w) of one input of the network."""
        return self.shape[0], *(self.tile or self.shown)

    @property
    def group(self) -> int:
        """How many images in a row have to be made together."""
        return len(self) if self.parametrization.coupled else max([1, *(term.group for term in self.terms)])

    @property
    def options(self) -> dict[str, object]:
        """What was asked, in numbers and words."""
        kinds = {name: [str(one) for one in getattr(self, name)] for name in ("transforms", "regularizers", "terms")}
        facts = {"steps": self.steps, "lr": self.lr, "size": list(self.shape[1:]), "shown": list(self.shown)}
        return {**facts, "parametrization": str(self.parametrization), **kinds}

    def only(self, start: int, stop: int) -> Task:
        """The task of making some of the images."""
        cut = {name: getattr(self, name) for name in ("targets", "early", "begin", "reference")}
        cut = {name: None if each is None else each[start:stop] for name, each in cut.items()}
        terms = [term.only(start, stop) for term in self.terms]
        return replace(self, **cut, terms=terms, first=self.first + start)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """Inside, the layers that the objective reads are watched."""
        names = [name for bound in self.targets for name in bound.target.layers]
        names += [name for bound in self.early for name in bound.target.layers]
        names += [name for term in self.terms for name in term.layers]
        through = any(bound.target.reads_output for bound in self.targets)
        watching = self.handle.watch(*dict.fromkeys(names), through=through, shape=self.seen)
        with self.parametrization.borrowed(), watching as watch:
            yield watch

    def canvas(self) -> Canvas:
        """The numbers at the start."""
        draw = Draw(self.seed, self.first, self.first + len(self))
        canvas = self.parametrization.canvas(draw, self.shape, self.handle.device, self.dtype)
        if self.begin is not None:
            canvas.paint(self.begin.to(self.handle.device, self.dtype))
        return canvas


@dataclass(frozen=True)
class Made:
    """Images `[n, C, H, W]` in [0, 1] on the CPU, and how they came about.

    scores: the target's value for each, as the network sees it untransformed, `[n]`. losses: what was minimised at each
    step, `[n, steps]`. alpha: `[n, 1, H, W]` in [0, 1], what the gradient was about. snapshots: images by the step
    after which they were. redirected: in how many steps each image's gradient was zero and replaced. stopped: why the
    run ended before its last step, if it did.
    """

    images: Tensor
    scores: Tensor
    losses: Tensor
    alpha: Tensor | None = None
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    redirected: tuple[int, ...] = ()
    stopped: str = ""
    interrupted: bool = False
