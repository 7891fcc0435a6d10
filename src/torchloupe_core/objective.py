"""The value of what is to be maximised, and its gradient at what the network is shown."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Reading, pick
from torchloupe_core.redirect import Redirected
from torchloupe_core.task import Task
from torchloupe_core.tiles import in_tiles
from torchloupe_core.watch import Watch

__all__ = ["Objective"]

Answer = tuple[Tensor, Tensor]


class Objective:
    """The targets of a task less its terms, of what the watched model sees.

    redirected: in how many asks each image's gradient was zero and replaced, `[n]`.
    """

    def __init__(self, task: Task, watch: Watch) -> None:
        self.task, self.watch = task, watch
        # Looked up once: a look walks through all of the model's parameters.
        self._device, self._model_dtype, self._dtype = task.handle.device, task.handle.dtype, task.dtype
        self.redirected = torch.zeros(len(task), dtype=torch.long)
        self._reference: dict[str, Tensor] = {}
        self._compiled: Callable[[Tensor, Tensor], Answer] | None = None

    def refer(self, views: Tensor) -> None:
        """Takes in what terms compare with, shown as the images will be."""
        with torch.no_grad():
            reading = self._read(views)
            self._reference = {name: reading.map(name) for term in self.task.terms for name in term.layers}

    def gradient(self, views: Tensor, *, early: float, first: bool) -> Answer:
        """What is to be minimised, `[n]`, and the gradient of what is to be maximised at `[views * n, C, h, w]`.

        early: how much reading units before their ReLU counts. first: whether to insist on a gradient; then raises
        `NotApplicable` where an image has none.
        """
        share = torch.tensor(early, dtype=self._dtype, device=self._device)
        ask = self._compiled or self._ask
        if self.task.compile and self._compiled is None:
            ask = self._compiled = self._compile(views, share)
        losses, pull = ask(views, share)
        if self.task.redirect or first:
            pull = self._with_a_gradient(views, share, pull, first)
        return losses, pull

    def value(self, views: Tensor) -> Tensor:
        """Of the target by itself, `[n]`."""
        with torch.no_grad():
            if self.task.tile is None:
                return self._values(views, None)[0]
            return in_tiles(lambda part: (self._values(part, None)[0], part), views, self.task.tile)[0]

    def _ask(self, views: Tensor, share: Tensor) -> Answer:
        if self.task.tile is None:
            return self._ask_whole(views, share)
        return in_tiles(lambda part: self._ask_whole(part, share), views, self.task.tile)

    def _ask_whole(self, views: Tensor, share: Tensor) -> Answer:
        with torch.enable_grad():
            leaf = views.detach().requires_grad_(True)
            values, penalties = self._values(leaf, share)
            return (penalties - values).detach(), _gradient(values - penalties, leaf)

    def _compile(self, views: Tensor, share: Tensor) -> Callable[[Tensor, Tensor], Answer]:
        """Forward and backward pass as one compiled graph of what they did once."""
        from torch.fx.experimental.proxy_tensor import make_fx

        if self.task.reference is not None:
            raise NotApplicable("what is compared with a given image changes at every step; leave out compile=")
        # A lambda, since make_fx counts a method's self; contiguous, since crops of views differ in their strides.
        graph = make_fx(lambda views, share: self._ask(views, share))(views.contiguous(), share)
        backend = self.task.compile if isinstance(self.task.compile, str) else "inductor"
        compiled = torch.compile(graph, backend=backend, dynamic=False)

        def ask(views: Tensor, share: Tensor) -> Answer:
            with torch.no_grad():
                losses, pull = compiled(views.contiguous(), share)
            self.task.handle.forwards += len(views)
            return losses, pull

        return ask

    def _with_a_gradient(self, views: Tensor, share: Tensor, pull: Tensor, first: bool) -> Tensor:
        """The gradient, exchanged for a redirected one where an image has none."""
        dead = ~self._moved(pull)
        if not bool(dead.any()):
            return pull
        if self.task.redirect:
            with Redirected():
                _, redirected = self._ask(views, share)
            self.redirected += dead.cpu()
            pull = torch.where(dead.repeat(len(pull) // len(dead)).view(-1, 1, 1, 1), redirected, pull)
        if first:
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

    def _values(self, views: Tensor, share: Tensor | None) -> Answer:
        """The target and the sum of the terms for each image, `[n]` each, averaged over its views.

        share: of the early reading, which counts for the gradient only; None for the target by itself.
        """
        task, reading = self.task, self._read(views)
        count = len(views) // len(task)
        values = pick(reading, list(task.targets) * count)
        penalties = torch.zeros_like(values)
        if share is not None:
            values = values * task.aim
            for term in task.terms:
                penalties = penalties + term.penalty(reading, self._reference)
            if task.early:
                more = pick(reading, list(task.early) * count) * task.aim * share
                values = values + more - more.detach()
        return values.to(self._dtype).view(count, -1).mean(0), penalties.to(self._dtype).view(count, -1).mean(0)

    def _read(self, views: Tensor) -> Reading:
        task = self.task
        inputs = task.handle.spec.normalised(views).to(self._model_dtype)
        with torch.autocast(self._device.type, task.precision, enabled=task.precision is not None):
            output = self.watch(inputs.contiguous(memory_format=task.memory_format or torch.contiguous_format))
        return Reading(task.handle, self.watch, output)


def _gradient(values: Tensor, leaf: Tensor) -> Tensor:
    """Of the sum of values; zero where they do not depend on the leaf at all."""
    if not values.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True, materialize_grads=True)
    return found
