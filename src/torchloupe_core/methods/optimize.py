"""Images optimised to move a target: the part that every engine shares, and the native engine.

A step is: numbers -> images -> what the network is shown of them -> objective -> gradient -> step of Adam. The forward
pass stops after the last layer the target reads, and the gradient is taken to the network's input only, so that
neither hooks nor parameters of the model are involved in what an engine does with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from torchloupe_core.adam import Adam
from torchloupe_core.canvas import Canvas, Draw
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle, Reading, Shape, pick
from torchloupe_core.parametrizations import Parametrization
from torchloupe_core.redirect import Redirected
from torchloupe_core.registry import method
from torchloupe_core.regularizers import Regularizer
from torchloupe_core.targets import Bound
from torchloupe_core.terms import Term
from torchloupe_core.transforms import Transform, Views
from torchloupe_core.watch import Watch

__all__ = ["Made", "Read", "Run", "Stopped", "Task", "native"]

OPAQUE = 0.8  # the quantile of what a pixel mattered from which on it is opaque

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
    snapshots: the steps after which images are kept. precision: of autocast, if any. report: told of each step.
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
    seed: int = 0
    first: int = 0
    redirect: bool = True
    early: Sequence[Bound] = ()
    warm: int = 0
    snapshots: tuple[int, ...] = ()
    precision: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    interruptible: bool = False
    report: Callable[[int, int, str], None] = lambda done, total, note: None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers optimised: single precision, or double where the model computes in it."""
        return torch.promote_types(self.handle.dtype, torch.float32)

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
        return replace(self, **cut, first=self.first + start)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """Inside, the layers that the objective reads are watched."""
        names = [name for bound in self.targets for name in bound.target.layers]
        names += [name for bound in self.early for name in bound.target.layers]
        names += [name for term in self.terms for name in term.layers]
        through = any(bound.target.reads_output for bound in self.targets)
        shape = (self.shape[0], *self.shown)
        watching = self.handle.watch(*dict.fromkeys(names), through=through, shape=shape)
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


class Stopped(Exception):
    """Ends a run early; what was made until then is kept."""


class Run:
    """One task under way: what happens at a step in every engine.

    An engine asks for `views(images)`, makes a step along the gradient of `loss(views, images)`, then says `stepped()`.
    canvas: an engine's own, or that of the task.
    """

    def __init__(self, task: Task, watch: Watch, canvas: Canvas) -> None:
        self.task, self.watch, self.canvas = task, watch, canvas
        self._views = Views(task.transforms, task.shape[1:], task.shown, task.seed)
        self.step, self.stopped, self.interrupted = 0, "", False
        self._losses: list[Tensor] = []
        self._snapshots: dict[int, Tensor] = {}
        self._about: Tensor | None = None
        self._device, self._model_dtype, self._dtype = (
            task.handle.device,
            task.handle.dtype,
            task.dtype,
        )  # looked up once
        self._redirected = torch.zeros(len(task), dtype=torch.long)
        self._reference: dict[str, Tensor] = {}
        self._good = self._latest = canvas.kept()  # the last numbers whose objective was finite; those after a step

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Inside, a run that has to stop ends quietly, and so does one stopped with Ctrl-C if the task says so."""
        try:
            yield
        except Stopped as reason:
            self._stop(str(reason))
        except KeyboardInterrupt:
            if not self.task.interruptible or self.step == 0:
                raise
            self.interrupted, self.stopped = True, f"interrupted after step {self.step}"
            self.canvas.go_back(self._latest)

    def views(self, images: Tensor) -> Tensor:
        """What the network is shown of the images at this step, `[views * n, C, h, w]`."""
        if self.task.reference is not None:
            state = self._views.generator.get_state()
            shown = self._views(self.task.reference.to(images))
            self._views.generator.set_state(state)  # the images are shown from the same point of view
            with torch.no_grad():
                reading, _ = self._read(shown)
                layers = {name for term in self.task.terms for name in term.layers}
                self._reference = {name: reading.map(name) for name in layers}
        return self._views(images)

    def loss(self, views: Tensor, images: Tensor) -> Tensor:
        """A number whose gradient at views and images is that of what is to be minimised.

        Its own value means nothing: the objective's gradient was taken already, at what is shown. Raises `Stopped`
        where the objective or its gradient is not finite, `NotApplicable` where there is no gradient to begin with.
        """
        losses, pull = self._objective(views.detach())
        total = -(views * pull.to(views)).sum()
        for one in self.task.regularizers:
            if (penalty := one.penalty(images)) is not None:
                total, losses = total + penalty.sum(), losses + penalty.detach()
        if (own := self.canvas.penalty()) is not None:  # an engine's own business
            losses = losses + own.detach()
        self._require_finite(losses, pull)
        self._losses.append(losses)
        self._good = self.canvas.kept()
        return total

    def about(self, gradient: Tensor) -> None:
        """Takes note of where the gradient at the images is large."""
        strength = gradient.detach().abs().mean(1, keepdim=True)
        self._about = strength if self._about is None else self._about + strength

    def stepped(self) -> None:
        """One step is made."""
        self.step, self._latest = self.step + 1, self.canvas.kept()
        if self.step in self.task.snapshots:
            self._snapshots[self.step] = self.canvas.images().detach().cpu()
        self.task.report(self.step, self.task.steps, f"objective {-self._losses[-1].mean():.4g}")

    def made(self) -> Made:
        """The images as they are now, or, where they are no good, as they last were."""
        images, scores = self._result()
        if not bool(scores.isfinite().all() and images.isfinite().all()):
            self._stop(self.stopped or f"the target is NaN or infinite after step {self.step}")
            images, scores = self._result()
        losses = torch.stack(self._losses, 1) if self._losses else torch.empty(len(self.task), 0)
        return Made(
            images.float().cpu(),
            scores.float().cpu(),
            losses.float().cpu(),
            None if self._about is None else _opacity(self._about.float().cpu()),
            snapshots={step: found.float() for step, found in self._snapshots.items()},
            redirected=tuple(self._redirected.tolist()),
            stopped=self.stopped,
            interrupted=self.interrupted,
        )

    def _result(self) -> tuple[Tensor, Tensor]:
        images = self.canvas.images().detach()
        plain = Views((), self.task.shape[1:], self.task.shown, 0)(images)
        with torch.no_grad():
            return images, self._values(plain, ())[0]

    def _objective(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be minimised, `[n]`, and the gradient of what is to be maximised at what is shown."""
        leaf = views.requires_grad_(True)
        with torch.enable_grad():
            values, penalties = self._values(leaf, self.task.terms)
            pull = _gradient(values - penalties, leaf)
        if self.task.redirect or self.step == 0:
            pull = self._with_a_gradient(leaf, pull)
        return (penalties - values).detach(), pull

    def _with_a_gradient(self, leaf: Tensor, pull: Tensor) -> Tensor:
        """The gradient, exchanged for a redirected one where an image has none."""
        dead = ~self._moved(pull)
        if not bool(dead.any()):
            return pull
        if self.task.redirect:
            with torch.enable_grad(), Redirected():
                values, penalties = self._values(leaf, self.task.terms)
                redirected = _gradient(values - penalties, leaf)
            self._redirected += dead.cpu()
            pull = torch.where(dead.repeat(len(pull) // len(dead)).view(-1, 1, 1, 1), redirected, pull)
        if self.step == 0:
            self._require_a_gradient(pull)
        return pull

    def _moved(self, pull: Tensor) -> Tensor:
        """`[n]` bool: whether an image's gradient is not zero everywhere, in all its views."""
        return pull.flatten(1).any(1).view(-1, len(self.task)).any(0)

    def _require_a_gradient(self, pull: Tensor) -> None:
        moved = self._moved(pull)
        if bool(moved.all()):
            return
        target = self.task.targets[int((~moved).nonzero()[0])].target
        if not self.task.redirect:
            raise NotApplicable(
                f"{target} has no gradient at the start, as a unit that its ReLU switches off; "
                "read='pre' asks for what goes into the ReLU, read='auto' redirects its gradient"
            )
        raise NotApplicable(
            f"{target} has no gradient with respect to the image, so no image can be optimised for it; something in "
            "between is cut off, as rounding and argmax do, or the value does not depend on the image"
        )

    def _values(self, views: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        """The target and the sum of the terms for each image, `[n]` each, averaged over its views."""
        reading, count = self._read(views)
        values = pick(reading, list(self.task.targets) * count) * (self.task.aim if terms else 1.0)
        penalties = torch.zeros_like(values)
        for term in terms:
            penalties = penalties + term.penalty(reading, self._reference)
        if torch.is_grad_enabled() and self.step < self.task.warm:
            more = pick(reading, list(self.task.early) * count) * self.task.aim * (1 - self.step / self.task.warm)
            values = values + more - more.detach()  # for the gradient only
        exact = self._dtype
        return values.to(exact).view(count, -1).mean(0), penalties.to(exact).view(count, -1).mean(0)

    def _read(self, views: Tensor) -> tuple[Reading, int]:
        task = self.task
        inputs = task.handle.spec.normalised(views).to(self._model_dtype)
        with torch.autocast(self._device.type, task.precision, enabled=task.precision is not None):
            output = self.watch(inputs.contiguous(memory_format=task.memory_format or torch.contiguous_format))
        return Reading(task.handle, self.watch, output), len(views) // len(task)

    def _require_finite(self, losses: Tensor, pull: Tensor) -> None:
        if bool(losses.isfinite().all()) and bool(pull.sum().isfinite()):
            return
        if self.step == 0:
            raise BadInput("the target or its gradient is NaN or infinite for the image at the start")
        raise Stopped(f"the target or its gradient is NaN or infinite after step {self.step}")

    def _stop(self, reason: str) -> None:
        """Back to the last numbers whose objective was finite."""
        self.stopped = reason
        self.canvas.go_back(self._good)


@method(
    "visualize",
    "native",
    needs=("gradient",),
    cost="steps (512) x (forward + backward), up to the last layer read",
    paper="Olah et al. 2017, Feature Visualization",
    random=True,
)
def native(task: Task) -> Made:
    """The loop in plain torch."""
    with task.watched() as watch:
        run = Run(task, watch, task.canvas())
        optimizer = Adam(run.canvas.tensors, task.lr)
        with run.under_way():
            while run.step < task.steps:
                _step(run, optimizer)
                run.stepped()
        return run.made()


def _step(run: Run, optimizer: Adam) -> None:
    canvas, regularizers = run.canvas, run.task.regularizers
    with torch.enable_grad():
        images = canvas.images()
        (gradient,) = torch.autograd.grad(run.loss(run.views(images), images), images)
        if run.task.parametrization.transparent:
            run.about(gradient)
        for one in regularizers:
            gradient = one.filtered(images.detach(), gradient)
        total = (images * gradient).sum()
        if (penalty := canvas.penalty()) is not None:
            total = total + penalty.sum()
        optimizer.step(torch.autograd.grad(total, canvas.tensors))
    canvas.settle()
    for one in regularizers:
        if one.on_image:
            changed = one.projected(canvas.images().detach(), gradient, run.step + 1)
            if changed is not None:
                canvas.paint(changed)


def _opacity(strength: Tensor) -> Tensor:
    """`[n, 1, H, W]` in [0, 1]: what matters in proportion to its share, the strongest fifth of the pixels in full."""
    ordered = strength.flatten(1).sort(1).values
    full = ordered[:, int(OPAQUE * (ordered.shape[1] - 1))].view(-1, 1, 1, 1)
    return (strength / full.clamp(min=1e-12)).clamp(0, 1)


def _gradient(values: Tensor, leaf: Tensor) -> Tensor:
    """Of the sum of values; zero where they do not depend on the leaf at all."""
    if not values.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True, materialize_grads=True)
    return found
