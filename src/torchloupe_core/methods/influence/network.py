"""Influence through any parameters of a model: sample-wise gradients and curvature products over the training set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchloupe_core.errors import NotApplicable
from torchloupe_core.memory import require
from torchloupe_core.methods.influence.pieces import Call, Piece
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT, Cotangents, Problem
from torchloupe_core.methods.influence.questions import Questions
from torchloupe_core.methods.influence.sample_gradients import SampleGradients
from torchloupe_core.methods.influence.training_images import Block, TrainingImages

__all__ = ["Curvature", "NetworkProblem"]

Curvature = Literal["gauss_newton", "hessian"]

MOST = 64  # images in one block
AT_ONCE = 32  # images whose patches are laid out at once
PROBES = 8  # of the trace, where the Jacobian is too large


@dataclass(eq=False)
class NetworkProblem(Problem):
    """P of a model's parameters. The model is borrowed meanwhile.

    curvature: "gauss_newton", J'WJ with the Jacobian J of the logits and the second derivative W of the loss by them,
    without negative eigenvalues (Martens 2020, New Insights and Perspectives on the Natural Gradient Method); for the
    cross-entropy it is the Fisher matrix. "hessian": of the loss itself. room: bytes that blocks of gradients may take.
    Up to 5,000 parameters sums are in float64.
    """

    model_gradients: SampleGradients
    images: TrainingImages
    tests: TrainingImages
    asked: Questions
    curvature: Curvature = "gauss_newton"
    _sums: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _roots: list[tuple[slice, Tensor]] | None = field(default=None, init=False)

    def within(self, part: slice) -> NetworkProblem:
        seed = self.seed + 1 + part.start  # or each part would draw the same
        return replace(self, images=self.images.part(part), labels=self.labels[part], seed=seed)

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        return self.model_gradients.size

    @cached_property
    def parameters(self) -> Tensor:
        return self.model_gradients.parameters.to(self.precise)

    @property
    def precise(self) -> torch.dtype:
        """What sums are in."""
        small = self.size <= LARGEST_EXPLICIT and self.handle.device.type != "mps"
        return torch.float64 if small else self.handle.dtype

    @cached_property
    def questions(self) -> Tensor:
        if self.asked.inner:
            return self._inner_questions()
        found = self.parameters.new_empty(len(self.tests), self.size)
        for block in self.tests.blocks(self._fitting(1)):
            which = torch.arange(block.part.start, block.part.stop)
            found[block.part] = self.model_gradients.rows(block.inputs, partial(self._slopes, which))[0][:, 0]
        return found

    def dots(self, vectors: Tensor) -> Tensor:
        return self._products_with(vectors, "products")

    def _products_with(self, vectors: Tensor, name: str) -> Tensor:
        """`[m, n]`: of vectors and gradients, whose norms and mean are kept as well. name: of the pass."""
        found = vectors.new_empty(len(vectors), self.n)
        if self.lasting is not None:
            norms, total = self.parameters.new_empty(self.n), torch.zeros_like(self.parameters)
            for part, arrays in self.lasting.each(name, self, self.n, partial(_of_part, vectors)):
                found[:, part], norms[part] = arrays["products"].to(found), arrays["norms"].to(norms)
                total += arrays["mean"].to(total) * (part.stop - part.start)
            self._sums = total / self.n, norms
            return found
        for begin, rows in self.gradients():
            found[:, begin : begin + len(rows)] = vectors @ rows.T
        return found

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        total, norms = torch.zeros_like(self.parameters), self.parameters.new_empty(self.n)
        for part, rows in self.passes(lambda logits, labels: self.loss.gradient(logits, labels)[:, None]):
            total += rows[:, 0].sum(0)
            norms[part] = rows[:, 0].norm(dim=1)
            yield part.start, rows[:, 0]
        self._sums = total / self.n, norms

    @property
    def pieces(self) -> Sequence[Piece]:
        return self.model_gradients.pieces

    def passes(self, cotangents: Cotangents, rows: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """rows: how many combinations there are, so that a block fits in its room."""
        for block in self.images.blocks(self._fitting(rows)):
            found, _ = self.model_gradients.rows(block.inputs, partial(_labelled, cotangents, self._labels(block)))
            yield block.part, found.to(self.precise)
            self.report(block.part.stop, self.n)

    def calls(
        self, cotangents: Cotangents, *, rest: bool
    ) -> Iterator[tuple[slice, Sequence[Call], Mapping[str, Tensor]]]:
        for block in self.images.blocks(AT_ONCE):
            wanted = partial(_labelled, cotangents, self._labels(block))
            calls, others, _ = self.model_gradients.apart(block.inputs, wanted, rest=rest)
            yield block.part, calls, others
            self.report(block.part.stop, self.n)

    @property
    def mean_gradient(self) -> Tensor:
        return self._summed()[0]

    @property
    def gradient_norms(self) -> Tensor:
        return self._summed()[1]

    def times(self, vectors: Tensor) -> Tensor:
        if self.written is not None:
            return vectors @ self.written
        total = torch.zeros_like(vectors)
        if self.curvature == "hessian" or not self._by_rows(len(vectors)):
            for block in self.images.blocks(MOST):
                total += self._products(block, vectors)
            return total / self.n
        for _, rows in self.roots():
            total += (vectors @ rows.T) @ rows
        return total / self.n

    def _written(self) -> Tensor:
        item = torch.finfo(self.precise).bits // 8
        require(3 * item * self.size**2, f"the curvature of {self.size:,} parameters", self.parameters.device)
        if self.curvature == "hessian":
            found = self.times(torch.eye(self.size, dtype=self.precise, device=self.parameters.device))
            return (found + found.T) / 2
        matrix = self.parameters.new_zeros(self.size, self.size)
        for _, rows in self.roots():
            matrix.addmm_(rows.T, rows)
        return matrix / self.n

    @cached_property
    def trace(self) -> float:
        """Of the Gauss-Newton matrix."""
        if self.lasting is not None:
            return self.lasting.once("trace", self, lambda whole: {"trace": torch.tensor(whole._trace())})[
                "trace"
            ].item()
        return self._trace()

    def _trace(self) -> float:
        if self._outputs * self.size * 8 <= self.room:
            return sum(rows.square().sum().item() for _, rows in self.roots()) / self.n
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (PROBES, self.size), generator=generator).to(self.parameters) * 2 - 1
        return ((self.times(signs) * signs).sum() / PROBES).item()

    def roots(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows `[B * K, P]` of a matrix whose square is the Gauss-Newton matrix, kept where there is room."""
        if self._roots is not None:
            yield from self._roots
            return
        item = torch.finfo(self.precise).bits // 8
        fits = self.n * self._outputs * self.size * item <= self.room / 2
        kept: list[tuple[slice, Tensor]] = []
        root = self.loss.root
        for part, rows in self.passes(lambda logits, labels: root(logits, labels).transpose(1, 2), self._outputs):
            found = rows.flatten(0, 1)
            if fits:
                kept.append((part, found))
            yield part, found
        self._roots = kept if fits else None

    def _products(self, block: Block, vectors: Tensor) -> Tensor:
        """`[m, P]`: the summed curvature of some images times vectors, through the model as a function."""
        gradients, labels = self.model_gradients, self._labels(block)
        tensors = {name: self.handle.module.get_parameter(name).detach() for name in gradients.names}

        def logits_of(parameters: dict[str, Tensor]) -> Tensor:
            return self.handle.logits(functional_call(self.handle.module, parameters, (block.inputs.clone(),)))

        def slope(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = grad(lambda them: self.loss(logits_of(them), labels).sum())(parameters)
            return found

        found = []
        with sdpa_kernel(SDPBackend.MATH):
            for vector in vectors.to(self.handle.dtype):
                direction = gradients.unpacked(vector)
                if self.curvature == "hessian":
                    found.append(gradients.packed(jvp(slope, (tensors,), (direction,))[1]))
                    continue
                moved = jvp(logits_of, (tensors,), (direction,))
                curved = self.loss.curved(moved[0].detach(), labels, moved[1])
                found.append(gradients.packed(vjp(logits_of, tensors)[1](curved)[0]))
        return torch.stack(found).detach().to(self.precise)

    def pixels(self, vector: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        gradients, labels = self.model_gradients, labels.to(inputs.device)
        tensors = {name: self.handle.module.get_parameter(name).detach() for name in gradients.names}
        direction = gradients.unpacked(vector.to(self.handle.dtype))

        def along(images: Tensor) -> Tensor:
            def loss_of(parameters: dict[str, Tensor]) -> Tensor:
                output = functional_call(self.handle.module, parameters, (images.clone(),))
                return self.loss(self.handle.logits(output), labels).sum()

            slope: Tensor = jvp(loss_of, (tensors,), (direction,))[1]
            return slope

        with sdpa_kernel(SDPBackend.MATH):
            found: Tensor = grad(along)(inputs)
        return found.detach()

    def _inner_questions(self) -> Tensor:
        """`[T, P]` of targets that read layers, one after another."""
        rows = []
        for block in self.tests.blocks(1):
            target = (self.asked.targets or ())[block.begin]
            bound = self.handle.bind(target, block.inputs)
            with self.model_gradients.free(), torch.enable_grad():
                value = -self.handle.read(block.inputs, bound)[0]
                if not value.requires_grad:
                    raise NotApplicable(
                        f"the target {target} does not depend on the layers asked about; name layers before it, or "
                        "'all'"
                    )
                found = self.model_gradients.derivative(value)
            rows.append(found)
        return torch.stack(rows).to(self.precise)

    def _summed(self) -> tuple[Tensor, Tensor]:
        """The mean gradient `[P]`, and the norm of each image's `[n]`."""
        if self._sums is None and self.lasting is not None:
            self._products_with(self.parameters.new_empty(0, self.size), "gradients")
        elif self._sums is None:
            for _ in self.gradients():
                pass
        if self._sums is None:
            raise RuntimeError("a pass over the training images ended before its end")
        return self._sums

    def _slopes(self, which: Tensor, logits: Tensor) -> Tensor:
        return self.asked.slopes(logits, which)[:, None]

    def _labels(self, block: Block) -> Tensor:
        return self.labels[block.part].to(self.handle.device)

    @property
    def _outputs(self) -> int:
        shape = self.images.scanned.shape
        return self.handle.trace(shape).outputs or 1

    def _by_rows(self, vectors: int) -> bool:
        """Whether products are sooner had from the rows of all classes than from the model, vector by vector."""
        return self._roots is not None or (self._outputs <= 4 * vectors and self._outputs * self.size * 8 <= self.room)

    def _fitting(self, rows: int) -> int:
        """How many images' rows of P numbers fit in a quarter of the room."""
        return max(1, min(MOST, int(self.room / 4 / (rows * self.size * 8))))


def _of_part(vectors: Tensor, problem: NetworkProblem, part: slice) -> dict[str, Tensor]:
    """What is kept of the gradients of some training images: products with vectors, norms, mean."""
    within = problem.within(part)
    products = within.dots(vectors)
    mean, norms = within._summed()
    return {"products": products, "norms": norms, "mean": mean}


def _labelled(cotangents: Cotangents, labels: Tensor, logits: Tensor) -> Tensor:
    return cotangents(logits, labels)
