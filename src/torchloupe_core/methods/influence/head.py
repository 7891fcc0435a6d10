"""The linear layer at the end of a model, with everything it read: influence in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle, Reading, Shape
from torchloupe_core.memory import require
from torchloupe_core.methods.influence.pieces import Call, Piece
from torchloupe_core.methods.influence.problem import Cotangents, Problem
from torchloupe_core.methods.influence.questions import Questions
from torchloupe_core.scan import Scanned, scan
from torchloupe_core.statistics import Features

__all__ = ["Head", "HeadProblem", "Rows", "linear_head", "read_rows", "require_linear"]

CHUNK = 2**24  # numbers held at once
CLOSE = 1e-3  # of the largest logit: by how much the head's own logits may differ from the model's


@dataclass(frozen=True)
class Head:
    """A linear layer `name`, whose outputs are the model's logits: `weights [K, D]`, with the bias as last column."""

    name: str
    reads: str
    weights: Tensor
    biased: bool

    def logits(self, features: Tensor) -> Tensor:
        """`[N, K]` of features `[N, D]` made by `with_bias`."""
        return features @ self.weights.T

    def with_bias(self, features: Tensor) -> Tensor:
        """`[N, D]`: features as the head reads them, with a 1 where it has a bias."""
        features = features.to(self.weights)
        return torch.cat([features, torch.ones_like(features[:, :1])], 1) if self.biased else features

    @property
    def piece(self) -> Piece:
        """Its parameters, as one of a model's modules."""
        classes, width = self.weights.shape
        names = (f"{self.name}.weight", f"{self.name}.bias") if self.biased else (f"{self.name}.weight",)
        shapes = (torch.Size([classes, width - self.biased]), torch.Size([classes]))
        return Piece(self.name, names, shapes[: len(names)], matrix=True)

    def spread(self, by_name: Callable[[str], float]) -> Tensor:
        """`[K, D]`: a number for each parameter, from one for its tensor's name."""
        found = torch.full_like(self.weights, by_name(f"{self.name}.weight"))
        if self.biased:
            found[:, -1] = by_name(f"{self.name}.bias")
        return found


def linear_head(handle: Handle, shape: Shape) -> Head:
    """The layer whose outputs are the model's logits. Raises `NotApplicable` where none is linear."""
    reads = handle.embedding_at(shape)
    name = reads.removesuffix(".in").split("#")[0]
    module = handle.module.get_submodule(name)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    flat = isinstance(weight, Tensor) and weight.flatten(1).shape == (len(weight), weight.numel() // len(weight))
    pointwise = not isinstance(module, nn.Conv2d) or (set(module.kernel_size) == {1} and module.groups == 1)
    if not reads.endswith(".in") or not isinstance(weight, Tensor) or not (flat and pointwise):
        raise NotApplicable(
            f"the head alone is asked about by default, and this model ends in no linear layer but in {name!r}, a "
            f"{type(module).__name__}; name layers= or take layers='all'"
        )
    columns = [weight.detach().flatten(1)] + ([bias.detach()[:, None]] if isinstance(bias, Tensor) else [])
    weights = torch.cat(columns, 1)
    precise = torch.float32 if weights.device.type == "mps" else torch.float64
    return Head(name, reads, weights.to(precise), isinstance(bias, Tensor))


@dataclass(frozen=True)
class Rows:
    """Images as the head sees them: their places in the data set, features `[N, D]`, labels `[N]` where known."""

    indices: Tensor
    features: Tensor
    scanned: Scanned


def read_rows(handle: Handle, data: DataSet, head: Head, **options: Any) -> Rows:
    """One pass over a data set, up to the head."""
    features = Features()
    scanned = scan(handle, data, {head.reads: [features]}, **options)
    indices, vectors = features.compute()
    return Rows(indices, head.with_bias(vectors), scanned)


def require_linear(handle: Handle, head: Head, inputs: Tensor, features: Tensor) -> None:
    """Compares the head's logits for features of a scan with those of the model for the images in one pass.

    Raises `NotApplicable` where something follows the head, `BadInput` where the model's output for an image depends
    on what else is in the batch, or on chance.
    """
    with handle.watch(head.reads, through=True, shape=(inputs.shape[1], inputs.shape[2], inputs.shape[3])) as watch:
        reading = Reading(handle, watch, watch(inputs))
        now, logits = head.with_bias(reading.embedding(head.reads).float().cpu()), reading.logits()
    scale = CLOSE * features.abs().max().item()
    if bool((now - features).abs().max() > scale):
        raise BadInput(
            "the model gives an image other features in another batch or at another time, so its loss is no sum over "
            "images: batch normalisation without running statistics, or dropout that does not heed eval mode"
        )
    own, theirs = head.logits(features), logits.detach().to(head.weights)
    if own.shape != theirs.shape or bool((own - theirs).abs().max() > CLOSE * theirs.abs().max()):
        raise NotApplicable(
            f"the model's output is not what {head.name!r} gives: something follows it; name layers=[{head.name!r}], "
            "which asks through the whole model, or layers='all'"
        )


@dataclass(eq=False)
class HeadProblem(Problem):
    """The head's parameters `[K, D]`, flattened, as P numbers; all that is needed is in memory.

    train, tests: features `[n, D]`, `[T, D]`.
    """

    head: Head
    train: Tensor
    tests: Tensor
    asked: Questions

    def within(self, part: slice) -> HeadProblem:
        return replace(self, train=self.train[part], labels=self.labels[part])

    @property
    def n(self) -> int:
        return len(self.train)

    @property
    def size(self) -> int:
        return self.head.weights.numel()

    @property
    def parameters(self) -> Tensor:
        return self.head.weights.flatten()

    @cached_property
    def logits(self) -> Tensor:
        """`[n, K]`: of the training images."""
        return self.head.logits(self.train)

    @cached_property
    def errors(self) -> Tensor:
        """`[n, K]`: the derivative of each training image's loss with respect to its logits."""
        return self.loss.gradient(self.logits, self.labels)

    @cached_property
    def questions(self) -> Tensor:
        slopes = self.asked.slopes(self.head.logits(self.tests))
        return (slopes[:, :, None] * self.tests[:, None]).flatten(1)

    def dots(self, vectors: Tensor) -> Tensor:
        return torch.cat(
            [
                (self._along(vectors, part) * self.errors[part]).sum(-1)  # [m, B]
                for part in self.parts_of(len(vectors))
            ],
            1,
        )

    def times(self, vectors: Tensor) -> Tensor:
        if self.written is not None:
            return vectors @ self.written
        total = torch.zeros_like(vectors).view(-1, *self.head.weights.shape)
        for part in self.parts_of(len(vectors)):
            curved = self.loss.curved(self.logits[part], self.labels[part], self._along(vectors, part))  # [m, B, K]
            total += torch.einsum("mbk,bd->mkd", curved, self.train[part])
        return total.flatten(1) / self.n

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        for part in self.parts_of(self.train.shape[1]):
            block = self.errors[part][:, :, None] * self.train[part][:, None]
            yield part.start, block.flatten(1)

    @property
    def pieces(self) -> Sequence[Piece]:
        return [self.head.piece]

    def passes(self, cotangents: Cotangents) -> Iterator[tuple[slice, Tensor]]:
        for part in self.parts_of(self.size):
            wanted = cotangents(self.logits[part], self.labels[part])  # [B, m, K]
            yield part, (wanted[..., None] * self.train[part][:, None, None]).flatten(2)

    def calls(
        self, cotangents: Cotangents, *, rest: bool
    ) -> Iterator[tuple[slice, Sequence[Call], Mapping[str, Tensor]]]:
        for part in self.parts_of(len(self.head.weights)):
            wanted = cotangents(self.logits[part], self.labels[part])
            features = self.train[part, : self.train.shape[1] - self.head.biased]
            linear = nn.Linear(1, 1, device="meta")  # only the kind counts
            yield part, [Call(self.head.piece, linear, features, wanted.unbind(1), len(features))], {}

    def _written(self) -> Tensor:
        require(3 * 8 * self.size**2, f"the Hessian of {self.size:,} parameters", self.train.device, "take 'cg'")
        classes, width = self.head.weights.shape
        matrix = self.train.new_zeros(classes, width, classes, width)
        for part in self.parts_of(classes):
            features, curvature = self.train[part], self.loss.curvature(self.logits[part], self.labels[part])
            for k in range(classes):
                for other in range(k + 1):
                    matrix[k, :, other] += (curvature[:, k, other, None] * features).T @ features
        matrix /= self.n
        for k in range(classes):
            for other in range(k):
                matrix[other, :, k] = matrix[k, :, other]
        return matrix.view(self.size, self.size)

    @property
    def trace(self) -> float:
        norms = self.train.square().sum(1)
        parts = self.parts_of(self.head.weights.shape[0])
        diagonals = [
            self.loss.curvature(self.logits[part], self.labels[part]).diagonal(0, 1, 2).sum(1) @ norms[part]
            for part in parts
        ]
        return torch.stack(diagonals).sum().item() / self.n

    @cached_property
    def mean_gradient(self) -> Tensor:
        return (self.errors.T @ self.train).flatten() / self.n

    def support(self, parameters: Tensor) -> Tensor:
        logits = torch.einsum("mkd,td->mtk", parameters.view(-1, *self.head.weights.shape), self.tests)
        every = torch.arange(len(self.tests)).repeat(len(logits))
        return self.asked.of(logits.flatten(0, 1), every).view(logits.shape[:2])

    def own_loss(self, parameters: Tensor, images: Sequence[int]) -> Tensor:
        """`[m]`: by how much the loss of each of m training images is larger at its row of other parameters."""
        rows, labels = self.train[list(images)], self.labels[list(images)]
        logits = torch.einsum("mkd,md->mk", parameters.view(-1, *self.head.weights.shape), rows)
        return self.loss(logits, labels) - self.loss(self.logits[list(images)], labels)

    def pixels(self, vector: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        shape = (inputs.shape[1], inputs.shape[2], inputs.shape[3])
        inputs = inputs.detach().requires_grad_(True)
        with torch.enable_grad(), self.handle.watch(self.head.reads, shape=shape) as watch:
            watch(inputs)
            features = self.head.with_bias(Reading(self.handle, watch, None).embedding(self.head.reads))
            errors = self.loss.gradient(self.head.logits(features), labels.to(features.device))
            along = features @ vector.view_as(self.head.weights).T
            (found,) = torch.autograd.grad((errors * along).sum(), inputs)
        return found

    @property
    def gradient_norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.errors, dim=1) * torch.linalg.vector_norm(self.train, dim=1)
        return norms

    def _along(self, vectors: Tensor, part: slice) -> Tensor:
        """`[m, B, K]`: by how much the logits of some training images change along each vector."""
        return self.train[part] @ vectors.view(-1, *self.head.weights.shape).transpose(1, 2)

    def parts_of(self, each: int) -> list[slice]:
        """Slices of the training images, such that `each` rows of K numbers for all of one fit in the chunk."""
        size = max(1, CHUNK // max(1, each * len(self.head.weights)))
        return [slice(begin, min(begin + size, self.n)) for begin in range(0, self.n, size)]
