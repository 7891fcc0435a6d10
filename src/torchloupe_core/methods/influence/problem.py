"""What a method of influence is asked: the training images' gradients, the curvature of their loss, the tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.handle import Handle
from torchloupe_core.losses import Loss
from torchloupe_core.methods.influence.lasting import Lasting
from torchloupe_core.methods.influence.pieces import Call, Piece
from torchloupe_core.methods.influence.solvers import factored

__all__ = ["LARGEST_EXPLICIT", "Answer", "Cotangents", "Problem"]

Cotangents = Callable[
    [Tensor, Tensor], Tensor
]  # of logits [B, K] and labels [B], `[B, m, K]` to multiply Jacobians with

LARGEST_EXPLICIT = 5_000  # parameters whose Hessian is written down and factored
# Damping where no weight decay is known. Grosse et al. 2023 take a tenth of the mean eigenvalue; on the head of a
# network that was stopped early a hundred times that agrees best with refits and finds most wrong labels.
MEAN_EIGENVALUES = 10.0


@dataclass
class Answer:
    """What a method found.

    scores: `[T, n]`, positive where the training image supported what is asked about. units: what a score of 1 means.
    vectors: `[T, P]`, so that a score is a product of one with the gradient of a training image, over n, where that is
    how they were made. diagnostics: of the solver. sign: in words, where it is another than for influence.
    """

    scores: Tensor
    units: str
    vectors: Tensor | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    sign: str | None = None


@dataclass(eq=False)
class Problem(ABC):
    """P parameters, n training images, T questions.

    The objective is the mean loss of the n images + sum of decay / 2 x parameter^2. Gradients and curvature below are
    those of the mean loss alone, without weight decay.

    seed: of everything random. report(done, total): is told of the work done. lasting: where passes are kept, None
    for nowhere. room: bytes that blocks of gradients, and what solvers hold, may take.
    """

    handle: Handle

    decay: Tensor  # [P]
    given_damping: float | None
    seed: int
    report: Callable[[int, int], None]
    loss: Loss
    labels: Tensor  # [n], of the training images
    elsewhere: Callable[[Handle], Problem]  # the same question of the model with other weights
    room: float
    written: Tensor | None = field(default=None, init=False)  # the curvature, once it is
    lasting: Lasting | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        """As it is sent to another process: what it tells of its work, and where it is kept, stay here."""
        return {**self.__dict__, "report": _untold, "elsewhere": _nowhere, "lasting": None}

    @abstractmethod
    def within(self, part: slice) -> Problem:
        """The same with some of the training images alone, kept nowhere."""

    @property
    @abstractmethod
    def n(self) -> int:
        """How many training images."""

    @property
    @abstractmethod
    def size(self) -> int:
        """P, how many parameters."""

    @property
    @abstractmethod
    def parameters(self) -> Tensor:
        """`[P]`, their values."""

    @property
    @abstractmethod
    def questions(self) -> Tensor:
        """`[T, P]`: the gradient of each test image's loss, or of minus its target."""

    @property
    @abstractmethod
    def pieces(self) -> Sequence[Piece]:
        """The parameters, module by module."""

    @abstractmethod
    def passes(self, cotangents: Cotangents) -> Iterator[tuple[slice, Tensor]]:
        """`[B, m, P]` for blocks of training images: m combinations of the gradients of each one's logits."""

    @abstractmethod
    def calls(
        self, cotangents: Cotangents, *, rest: bool
    ) -> Iterator[tuple[slice, Sequence[Call], Mapping[str, Tensor]]]:
        """The same, as the calls of linear layers and convolutions, and `[B, m, size]` of other modules by name."""

    @abstractmethod
    def dots(self, vectors: Tensor) -> Tensor:
        """`[m, n]`: each vector `[m, P]` times the gradient of each training image's loss."""

    @abstractmethod
    def times(self, vectors: Tensor) -> Tensor:
        """`[m, P]`: the curvature of the mean loss times each vector."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        """The gradients of all training images' losses in blocks: where a block begins, and `[B, P]`."""

    @abstractmethod
    def _written(self) -> Tensor:
        """`[P, P]`: the curvature, written down. Raises `BadInput` where the memory does not suffice."""

    @property
    @abstractmethod
    def trace(self) -> float:
        """The sum of the curvature's eigenvalues, or an estimate."""

    @property
    @abstractmethod
    def gradient_norms(self) -> Tensor:
        """`[n]`: the norm of the gradient of each training image's loss."""

    @property
    def typical_gradient(self) -> float:
        """That of a training image, at the median."""
        return float(self.gradient_norms.median().clamp(min=1e-30))

    @cached_property
    def mean_gradient(self) -> Tensor:
        """`[P]`: of the mean loss."""
        total = torch.zeros_like(self.parameters)
        for _, block in self.gradients():
            total += block.sum(0)
        return total / self.n

    @abstractmethod
    def pixels(self, vector: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """`[N, C, H, W]`: how a vector `[P]` times the gradient of an image's loss changes with the image's pixels.

        Asked while the model is borrowed.
        """

    @cached_property
    def damping(self) -> float:
        """What is added to the curvature's eigenvalues beside the weight decay."""
        if self.given_damping is not None:
            return self.given_damping
        return 0.0 if self.decayed else MEAN_EIGENVALUES * self.trace / self.size

    @property
    def decayed(self) -> bool:
        """Whether there is a weight decay on any parameter."""
        return bool((self.decay > 0).any())

    def damped(self, vectors: Tensor) -> Tensor:
        """`[m, P]`: the curvature of the objective, with weight decay and damping, times each vector."""
        return self.times(vectors) + (self.decay + self.damping) * vectors

    def matrix(self) -> Tensor:
        """`[P, P]`: the curvature, kept; products are taken with it from then on."""
        if self.written is None:
            self.written = self._written()
        return self.written

    @cached_property
    def factor(self) -> Tensor:
        """`[P, P]`: the Cholesky factor of the damped curvature. Raises `NotApplicable` if it is not positive."""
        matrix = self.matrix().clone()
        matrix.diagonal().add_(self.decay + self.damping)
        return factored(matrix)

    def objective_gradient(self) -> Tensor:
        """`[P]`: of mean loss and weight decay, zero at the end of a training."""
        return self.mean_gradient + self.decay * self.parameters


def _untold(done: int, total: int) -> None:
    pass


def _nowhere(handle: Handle) -> Problem:
    raise TypeError("a problem that was sent to another process has no other weights")
