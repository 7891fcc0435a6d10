"""Images optimised to move a target: the course of a run in every engine, and the native engine.

A step is: numbers -> images -> what the network is shown of them -> objective -> gradient -> step downhill. The forward
pass stops after the last layer the target reads, and the gradient is taken to the network's input only, so that
neither hooks nor parameters of the model are involved in what an engine does with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from torchloupe_core.canvas import Canvas
from torchloupe_core.descent import Descent
from torchloupe_core.errors import BadInput
from torchloupe_core.objective import Objective
from torchloupe_core.registry import method
from torchloupe_core.task import Made, Task
from torchloupe_core.transforms import Views
from torchloupe_core.watch import Watch

__all__ = ["Run", "Stopped", "native"]

OPAQUE = 0.8  # the quantile of what a pixel mattered from which on it is opaque


class Stopped(Exception):
    """Ends a run early; what was made until then is kept."""


class Run:
    """One task under way: what happens at a step in every engine.

    An engine asks for `views(images)`, makes a step along the gradient of `loss(views, images)`, then says `stepped()`.
    canvas: an engine's own, or that of the task.
    """

    def __init__(self, task: Task, watch: Watch, canvas: Canvas) -> None:
        self.task, self.canvas, self.objective = task, canvas, Objective(task, watch)
        self.step, self.stopped, self.interrupted = 0, "", False
        self._views = Views(task.transforms, task.shape[1:], task.shown, task.seed)
        self._losses: list[Tensor] = []
        self._snapshots: dict[int, Tensor] = {}
        self._about: Tensor | None = None
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
        if self.task.reference is not None and (self.task.transforms or self.step == 0):  # else it looks the same
            state = self._views.generator.get_state()
            self.objective.refer(self._views(self.task.reference.to(images)))
            self._views.generator.set_state(state)  # the images are shown from the same point of view
        return self._views(images)

    def loss(self, views: Tensor, images: Tensor) -> Tensor:
        """A number whose gradient at views and images is that of what is to be minimised.

        Its own value means nothing: the objective's gradient was taken already, at what is shown. Raises `Stopped`
        where the objective or its gradient is not finite, `NotApplicable` where there is no gradient to begin with.
        """
        task = self.task
        early = max(0.0, 1 - self.step / task.warm) if task.warm else 0.0
        losses, pull = self.objective.gradient(views.detach(), early=early, first=self.step == 0)
        total = -(views * pull.to(views)).sum()
        for one in task.regularizers:
            if (penalty := one.penalty(images)) is not None:
                total, losses = total + penalty.sum(), losses + penalty.detach()
        if (own := self.canvas.penalty()) is not None:  # its gradient is the engine's business
            losses = losses + own.detach()
        self._require_finite(losses, pull)
        self._losses.append(losses)
        self._good = self.canvas.kept()
        return total

    @property
    def losses(self) -> Tensor:
        """What was minimised when it was last asked for, `[n]`."""
        return self._losses[-1]

    def know(self, losses: Tensor | None) -> None:
        """Takes note of the losses after a step, where the optimiser knows them."""
        if losses is not None:
            self._losses[-1], self._good = losses, self.canvas.kept()

    def about(self, gradient: Tensor) -> None:
        """Takes note of where the gradient at the images is large."""
        strength = gradient.detach().abs().mean(1, keepdim=True)
        self._about = strength if self._about is None else self._about + strength

    def stepped(self) -> None:
        """One step is made."""
        self.step, self._latest = self.step + 1, self.canvas.kept()
        if self.step in self.task.snapshots:
            self._snapshots[self.step] = self.canvas.images().detach().float().cpu()
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
            self._snapshots,
            tuple(self.objective.redirected.tolist()),
            self.stopped,
            self.interrupted,
        )

    def _result(self) -> tuple[Tensor, Tensor]:
        images = self.canvas.images().detach()
        return images, self.objective.value(Views((), self.task.shape[1:], self.task.shown, 0)(images))

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
        optimizer = task.optimizer(run.canvas.tensors, task.lr)
        with run.under_way():
            while run.step < task.steps:
                _step(run, optimizer)
                run.stepped()
        return run.made()


def _step(run: Run, optimizer: Descent) -> None:
    canvas, regularizers = run.canvas, run.task.regularizers
    optimizer.begin()
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
        run.know(optimizer.step(torch.autograd.grad(total, canvas.tensors), run.losses))
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
