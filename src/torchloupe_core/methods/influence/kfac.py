"""K-FAC and EK-FAC: the curvature of each linear layer or convolution as a product of two small matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.methods.influence.checkpoints import Checkpoint, along
from torchloupe_core.methods.influence.lasting import summed
from torchloupe_core.methods.influence.pieces import Call, Piece
from torchloupe_core.methods.influence.problem import Answer, Cotangents, Problem
from torchloupe_core.methods.influence.solvers import ROUNDING, singular
from torchloupe_core.registry import method

__all__ = ["Fisher", "Kronecker", "ekfac", "fitted", "kfac"]

Fisher = Literal["sampled", "exact", "empirical"]

CHANGE = "the change when the training image is removed, to first order, with the curvature as products by layer"
SIDES = ("reading", "back")
SOLVED = 256  # vectors at once
SHARE = 0.1  # of the mean eigenvalue: damping where there is no weight decay (Grosse et al. 2023, section 2.2)


@dataclass
class Factors:
    """One layer's curvature in `groups` blocks `reading [G, I, I] x back [G, O, O]`, turned to their eigenvectors.

    eigenvalues: `[G, O, I]` in that basis; for K-FAC products, for EK-FAC the mean square of the gradient there.
    """

    piece: Piece
    reading: Tensor
    back: Tensor
    eigenvalues: Tensor

    def turned(self, rows: Tensor) -> Tensor:
        """`[..., G, O, I]`: gradients `[..., size]` in the basis of eigenvectors."""
        shaped = rows.view(*rows.shape[:-1], *self.eigenvalues.shape)
        return self.back.transpose(1, 2) @ shaped @ self.reading

    def turned_back(self, turned: Tensor) -> Tensor:
        """`[..., size]`."""
        return (self.back @ turned @ self.reading.transpose(1, 2)).flatten(-3)

    def turned_gradients(self, call: Call) -> Iterator[Tensor]:
        """`[N, G, O, I]`, m times: turned where that is less work, what was read and got back, or their product."""
        reads, reading, back = call.reads(), self.reading.to(call.given), self.back.to(call.given)
        positions, outputs = reads.shape[1], self.eigenvalues.shape[1]
        early = positions < outputs
        if early:
            reads = torch.einsum("nlgi,gij->nlgj", reads, reading)
        for got in call.backs():
            product = torch.einsum("nlgo,nlgi->ngoi", got, reads)
            yield back.transpose(1, 2) @ (product if early else product @ reading)


@dataclass
class Kronecker:
    """The curvature of all layers, block by block; of parameters without factors the diagonal `[size]` alone."""

    parts: list[tuple[Piece, Factors | Tensor]]

    @property
    def eigenvalues(self) -> Tensor:
        """`[P]`, of all layers."""
        return torch.cat([self._of(part).flatten() for _, part in self.parts])

    def solve(self, vectors: Tensor, added: Tensor) -> Tensor:
        """`[m, P]`: the inverse of the curvature with `added [P]` on its diagonal, times vectors `[m, P]`.

        Where weight decays differ within a layer their mean counts in the layer's own basis.
        """
        sizes = [piece.size for piece, _ in self.parts]
        found = torch.empty_like(vectors)
        places = [torch.split(one, sizes, -1) for one in (vectors, added, found)]
        for (_, part), own, extra, place in zip(self.parts, *places, strict=True):
            if isinstance(part, Tensor):
                place.copy_(own / (part + extra))
                continue
            for begin in range(0, len(own), SOLVED):
                some = slice(begin, begin + SOLVED)
                place[some] = part.turned_back(part.turned(own[some]) / (part.eigenvalues + extra.mean()))
        return found

    @staticmethod
    def _of(part: Factors | Tensor) -> Tensor:
        return part if isinstance(part, Tensor) else part.eigenvalues


@method(
    "influence",
    "kfac",
    cost="2 passes, 3 with layers that have no factors",
    paper="Martens and Grosse 2015, Optimizing Neural Networks with Kronecker-factored Approximate Curvature; "
    "for convolutions Grosse and Martens 2016",
    random=True,
)
def kfac(
    problem: Problem, *, fisher: Fisher = "sampled", samples: int = 1, checkpoints: Sequence[Checkpoint] = ()
) -> Answer:
    """Each layer's Fisher matrix as the product of the second moments of what it reads and of what comes back to it.

    fisher: whose gradients come back: "sampled", `samples` random combinations of the outputs with the curvature of the
    loss as covariance; "exact", all K of them; "empirical", the loss for the labels. Parameters of other layers, as of
    normalisation, have their own diagonal. Layers do not interact. checkpoints: the model with the weights of other
    trainings, over which the scores are averaged; that of the model itself counts only without.
    """
    return _averaged_over(problem, checkpoints, partial(fitted, fisher=fisher, samples=samples, corrected=False))


@method(
    "influence",
    "ekfac",
    cost="3 passes",
    paper="George et al. 2018, Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis; "
    "Grosse et al. 2023, Studying Large Language Model Generalization with Influence Functions",
    random=True,
)
def ekfac(
    problem: Problem, *, fisher: Fisher = "sampled", samples: int = 1, checkpoints: Sequence[Checkpoint] = ()
) -> Answer:
    """K-FAC's eigenvectors with eigenvalues measured along them in one more pass. Options as of kfac."""
    return _averaged_over(problem, checkpoints, partial(fitted, fisher=fisher, samples=samples, corrected=True))


def fitted(problem: Problem, fisher: Fisher, samples: int, *, corrected: bool) -> Kronecker:
    """The factors of all layers, in one pass, and their eigenvalues in another."""
    if fisher not in ("sampled", "exact", "empirical"):
        raise BadInput(f'fisher is "sampled", "exact" or "empirical"; got {fisher!r}')
    if samples < 1:
        raise BadInput(f"samples is at least 1; got {samples}")

    def moments_of(part: Problem) -> dict[str, Tensor]:
        found = _moments(part, _cotangents(part, fisher, samples))
        return {
            f"{side} {piece.module}": one
            for piece, both in found.items()
            for side, one in zip(SIDES, both, strict=True)
        }

    moments = _averaged(problem, "moments", moments_of)
    factors: dict[Piece, Factors] = {}
    for piece in problem.pieces:
        both = [moments.get(f"{side} {piece.module}") for side in SIDES]
        if both[0] is not None and both[1] is not None:
            factors[piece] = _eigen(piece, both[0], both[1], problem.parameters)
    rest = [piece for piece in problem.pieces if piece not in factors]
    squares: dict[Piece, Tensor] = {}

    def squares_of(part: Problem) -> dict[str, Tensor]:
        found = _squares(part, _cotangents(part, fisher, samples), factors if corrected else {}, rest)
        return {piece.module: one for piece, one in found.items()}

    if corrected or rest:
        found = _averaged(problem, "squares", squares_of)
        squares = {piece: found[piece.module] for piece in problem.pieces if piece.module in found}
    for piece in factors if corrected else ():
        factors[piece].eigenvalues = squares[piece]
    return Kronecker([(piece, factors.get(piece, squares.get(piece, torch.empty(0)))) for piece in problem.pieces])


def _averaged(problem: Problem, name: str, of: Callable[[Problem], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `of` finds as means over images, from all of them or from the parts that are kept."""
    if problem.lasting is None:
        return of(problem)
    parts = problem.lasting.each(name, problem, problem.n, lambda whole, part: of(whole.within(part)))
    return {name: one.to(problem.handle.device) for name, one in summed(parts, problem.n).items()}


def _cotangents(problem: Problem, fisher: Fisher, samples: int) -> Cotangents:
    """`[B, m, K]` of logits and labels, such that their outer products add up to the curvature of the loss."""
    loss, generator = problem.loss, torch.Generator().manual_seed(problem.seed)

    def made(logits: Tensor, labels: Tensor) -> Tensor:
        if fisher == "empirical":
            return loss.gradient(logits, labels)[:, None]
        root = loss.root(logits, labels)
        if fisher == "exact":
            return root.transpose(1, 2)
        signs: Tensor = torch.randint(0, 2, (len(logits), samples, logits.shape[1]), generator=generator).to(root)
        combined: Tensor = (2 * signs - 1) @ root.transpose(1, 2) / samples**0.5
        return combined

    return made


def _moments(problem: Problem, cotangents: Cotangents) -> dict[Piece, tuple[Tensor, Tensor]]:
    """For each layer with factors the mean over images of what it reads, squared, `[G, I, I]`, and gets back.

    Of several positions the first are added and the second averaged, as if positions were independent.
    """
    found: dict[Piece, tuple[Tensor, Tensor]] = {}
    for _, calls, _ in problem.calls(cotangents, rest=False):
        for call in calls:
            reads = call.reads().permute(2, 0, 1, 3).flatten(1, 2)  # [G, N * L, I]
            positions = reads.shape[1] // call.images
            reading, back = reads.transpose(1, 2) @ reads, reads.new_zeros(())
            for got in call.backs():
                flat = got.permute(2, 0, 1, 3).flatten(1, 2)
                back = back + flat.transpose(1, 2) @ flat / positions
            before = found.get(call.piece)
            found[call.piece] = (reading, back) if before is None else (before[0] + reading, before[1] + back)
    return {piece: (reading / problem.n, back / problem.n) for piece, (reading, back) in found.items()}


def _eigen(piece: Piece, reading: Tensor, back: Tensor, like: Tensor) -> Factors:
    of_reading, reading = torch.linalg.eigh(reading.to(_precise(like)))
    of_back, back = torch.linalg.eigh(back.to(_precise(like)))
    values = of_back.clamp(min=0)[:, :, None] * of_reading.clamp(min=0)[:, None]
    return Factors(piece, reading.to(like), back.to(like), values.to(like))


def _squares(
    problem: Problem, cotangents: Cotangents, factors: Mapping[Piece, Factors], rest: Sequence[Piece]
) -> dict[Piece, Tensor]:
    """The mean over images of each layer's gradient, squared: in its own basis where it has one."""
    found: dict[Piece, Tensor] = {}
    by_name = {piece.module: piece for piece in rest}

    def add(piece: Piece, squares: Tensor) -> None:
        found[piece] = found.get(piece, 0) + squares.to(problem.parameters) / problem.n

    for _, calls, others in problem.calls(cotangents, rest=bool(rest)):
        turned: dict[Piece, list[Tensor]] = {}  # a layer that is called twice adds up before it is squared
        for call in calls if factors else ():
            own = list(factors[call.piece].turned_gradients(call))
            before = turned.get(call.piece)
            turned[call.piece] = own if before is None else [a + b for a, b in zip(before, own, strict=True)]
        for piece, rows in turned.items():
            add(piece, torch.stack([one.square().sum(0) for one in rows]).sum(0))
        for name, rows_ in others.items():
            add(by_name[name], rows_.square().sum((0, 1)))
    return found


def _averaged_over(problem: Problem, checkpoints: Sequence[Checkpoint], fit: Callable[[Problem], Kronecker]) -> Answer:
    """The answer of the model, or the mean of those of other weights of it."""
    if not checkpoints:
        return _answered(problem, fit(problem))
    scores, facts = torch.zeros(()), list[Mapping[str, Any]]()
    for there in along(problem, checkpoints):
        answer = _answered(there, fit(there))
        scores = scores + answer.scores.cpu() / len(checkpoints)
        facts.append(answer.diagnostics)
    eigenvalues = [one["eigenvalues"] for one in facts]
    extremes = {"largest": max(e["largest"] for e in eigenvalues), "smallest": min(e["smallest"] for e in eigenvalues)}
    damping = sum(one["damping"] for one in facts) / len(facts)
    said = {**facts[0], "eigenvalues": extremes, "damping": damping, "models": len(checkpoints)}
    return Answer(scores, f"{CHANGE}, the mean over {len(checkpoints)} models", diagnostics=said)


def _answered(problem: Problem, curvature: Kronecker) -> Answer:
    eigenvalues = curvature.eigenvalues
    damping = problem.given_damping
    if damping is None:
        damping = 0.0 if problem.decayed else SHARE * eigenvalues.mean().item()
    if not damping and not problem.decayed and bool(eigenvalues.min() <= ROUNDING * eigenvalues.max()):
        raise singular(eigenvalues)
    vectors = curvature.solve(problem.questions, (problem.decay + damping).expand_as(problem.parameters))
    scores = problem.dots(vectors) / problem.n
    alone = sum(piece.size for piece, part in curvature.parts if isinstance(part, Tensor))
    facts = {
        "eigenvalues": {"largest": eigenvalues.max().item(), "smallest": eigenvalues.min().item()},
        "damping": damping,
        "damping_chosen": problem.given_damping is None and damping > 0,
        "diagonal_parameters": alone,
    }
    return Answer(scores, CHANGE, vectors, facts)


def _precise(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
