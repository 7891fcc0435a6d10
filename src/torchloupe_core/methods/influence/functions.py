"""Influence functions (Koh and Liang 2017): what removing a training image would do, to first order.

    score = 1/n  q^T (H + decay + damping)^-1 g

q is the gradient of the test image's loss, or of minus a target; g that of the training image's loss; H the curvature
of the mean loss over n training images. Removing the training image changes the loss of the test by about the score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.memory import require
from torchloupe_core.methods.influence.head import HeadProblem
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT, Answer, Problem
from torchloupe_core.methods.influence.removal import newton_removal
from torchloupe_core.methods.influence.solvers import (
    ROUNDING,
    Krylov,
    Solved,
    conjugate_gradients,
    indefinite,
    lanczos,
    neumann,
)
from torchloupe_core.registry import method

__all__ = ["arnoldi", "cg", "exact", "gradient_dot", "lissa", "self_influence"]

CHANGE = "the change when the training image is removed, to first order"
NEWTON = "the change when the training image is removed, after one step of Newton's method from there"
DOT = "the gradients' dot product over n, a step of gradient descent with rate 1 that leaves the training image out"
ITSELF = "the change of the training image's own loss when it is removed, to first order"
NORM = "the squared norm of the gradient over n"

SMALL = 2_000  # parameters whose eigenvalues are all found
SPECTRUM = 40  # products with the Hessian to see its extreme eigenvalues
CG_HOLDS, LISSA_HOLDS = 8, 5  # so many times as many numbers as there are in the questions
MARGIN = 1.1  # by which the scale of lissa exceeds the top eigenvalue

_KOH = "Koh and Liang 2017, Understanding Black-box Predictions via Influence Functions"


@method("influence", "exact", cost="1 pass + a Cholesky factor of P x P, P up to 5,000", paper=_KOH)
def exact(problem: Problem, *, removal: Literal["first_order", "newton"] = "first_order") -> Answer:
    """The Hessian written down and factored.

    removal="newton", for the head: the loss after one step of Newton's method without the training image, which is
    leave-one-out itself where the loss is squared; no linear approximation of the test's loss either.
    """
    _require_explicit(problem, "exact")
    vectors = torch.cholesky_solve(problem.questions.T, problem.factor).T
    solved = Solved(vectors, 1, _residual_of(problem, vectors))
    if removal == "first_order":
        return _answered(problem, solved, CHANGE, spectrum_of(problem))
    if removal != "newton":
        raise BadInput(f'removal is "first_order" or "newton"; got {removal!r}')
    if not isinstance(problem, HeadProblem):
        raise BadInput("removal='newton' is for the linear head; for other layers take removal='first_order'")
    diagnostics = {**_facts(solved), "eigenvalues": spectrum_of(problem)}
    return Answer(newton_removal(problem), NEWTON, vectors, diagnostics)


@method("influence", "cg", cost="1 pass for each iteration; the head is read once", paper=f"{_KOH}, section 3")
def cg(problem: Problem, *, tolerance: float = 1e-5, iterations: int = 1_000) -> Answer:
    """Conjugate gradients, until the residual is `tolerance` of the right-hand side, at most `iterations`."""
    _require_positive(tolerance=tolerance, iterations=iterations)
    _write_down(problem)
    solve = partial(conjugate_gradients, problem.damped, tolerance=tolerance, iterations=iterations)
    solved = _in_groups(problem, solve, CG_HOLDS)
    return _answered(problem, solved, CHANGE, spectrum_of(problem))


@method("influence", "lissa", cost="1 pass for each of depth steps", paper="Agarwal et al. 2017, LiSSA; " + _KOH)
def lissa(problem: Problem, *, scale: float | None = None, depth: int = 20_000, tolerance: float = 1e-3) -> Answer:
    """The Neumann series of the damped Hessian over `scale`, which is chosen a little above its top eigenvalue.

    Ends when the residual is `tolerance` of the right-hand side, at the latest after `depth` steps; how far it came is
    in the diagnostics. Raises `BadInput` where it diverges.
    """
    _require_positive(tolerance=tolerance, depth=depth, scale=1.0 if scale is None else scale)
    _write_down(problem)
    spectrum = spectrum_of(problem)
    largest = spectrum["largest"] + float(problem.decay.max()) + problem.damping
    solve = partial(neumann, problem.damped, scale=scale or MARGIN * largest, depth=depth, tolerance=tolerance)
    solved = _in_groups(problem, solve, LISSA_HOLDS)
    answer = _answered(problem, solved, CHANGE, spectrum)
    return Answer(
        answer.scores, answer.units, answer.vectors, {**answer.diagnostics, "scale": scale or MARGIN * largest}
    )


@method(
    "influence",
    "arnoldi",
    cost="1 pass for each of steps products",
    paper="Schioppa et al. 2022, Scaling Up Influence Functions",
)
def arnoldi(problem: Problem, *, steps: int = 200, rank: int = 50) -> Answer:
    """The inverse on the eigenvectors of the `rank` largest eigenvalues alone, as `steps` of Lanczos see them."""
    _require_positive(steps=steps, rank=rank)

    def ritz(whole: Problem) -> dict[str, Tensor]:
        values, vectors = _krylov(whole, max(steps, rank)).ritz()
        return {"values": values[-rank:], "vectors": vectors[-rank:]}

    kept = ritz(problem) if problem.lasting is None else problem.lasting.once("eigenvectors", problem, ritz)
    values, vectors = (kept[name].to(problem.parameters) for name in ("values", "vectors"))
    positive = values > 0
    values, vectors = values[positive], vectors[positive]
    decay = (vectors.square() * problem.decay).sum(1)  # of each direction
    inverse = 1 / (values + decay + problem.damping)
    found = ((problem.questions @ vectors.T) * inverse) @ vectors
    solved = Solved(found, steps, _residual_of(problem, found))
    spectrum = {"largest": values[-1].item(), "smallest_kept": values[0].item(), "kept": len(values)}
    return _answered(problem, solved, f"{CHANGE}, within {len(values)} directions", spectrum)


@method(
    "influence",
    "gradient_dot",
    cost="1 pass",
    paper="Charpiat et al. 2019, Input Similarity from the Neural Network Perspective",
)
def gradient_dot(problem: Problem) -> Answer:
    """The dot product of the gradients, with no curvature."""
    return Answer(problem.dots(problem.questions) / problem.n, DOT, problem.questions)


@method("influence", "self", cost="as exact", paper=f"{_KOH}, section 5.4")
def self_influence(problem: Problem, *, with_curvature: bool = True) -> Answer:
    """Each training image's influence on its own loss, `[1, n]`; what the test images are does not matter.

    Large where an image is fitted against the others, as with a wrong label. with_curvature=False: its gradient's
    squared norm.
    """
    scores = problem.parameters.new_empty(1, problem.n)
    if with_curvature:
        _require_explicit(problem, "self")
    for begin, block in problem.gradients():
        if with_curvature:
            block = torch.linalg.solve_triangular(problem.factor, block.T, upper=False).T
        scores[0, begin : begin + len(block)] = block.square().sum(1) / problem.n
    if not with_curvature:
        return Answer(scores, NORM)
    return Answer(scores, ITSELF, diagnostics={"eigenvalues": spectrum_of(problem)})


def spectrum_of(problem: Problem) -> dict[str, float]:
    """The extreme eigenvalues of the curvature without decay and damping, as Lanczos' method sees them.

    They are exact where a small Hessian was written down; elsewhere the smallest is an upper bound. Raises
    `NotApplicable` if the damped curvature has a negative one.
    """
    known = problem.written if problem.size <= SMALL else None
    values = _ritz_values(problem) if known is None else torch.linalg.eigvalsh(known)
    largest, least = values[-1].item(), values[0].item()
    rounding = (1e-6 if known is None else ROUNDING) * max(abs(least), abs(largest))
    if least + float(problem.decay.min()) + problem.damping < -rounding:
        raise indefinite(least, "at most" if known is None else "about")
    return {"largest": largest, "smallest": 0.0 if abs(least) < rounding else least}


def _write_down(problem: Problem) -> None:
    """Writes the curvature down where that costs less than a few dozen products with it."""
    worth = 8 * problem.n if isinstance(problem, HeadProblem) else 40 * len(problem.questions)
    if problem.size <= min(LARGEST_EXPLICIT, worth):
        problem.matrix()


def _krylov(problem: Problem, steps: int) -> Krylov:
    return lanczos(problem.times, problem.size, steps, problem.parameters, problem.seed)


def _ritz_values(problem: Problem) -> Tensor:
    """Approximate eigenvalues, rising."""

    def found(whole: Problem) -> dict[str, Tensor]:
        return {"values": _krylov(whole, SPECTRUM).ritz()[0]}

    kept = problem.lasting
    return (found(problem) if kept is None else kept.once("spectrum", problem, found))["values"]


def _in_groups(problem: Problem, solve: Callable[[Tensor], Solved], holds: int) -> Solved:
    """The questions solved in groups, such that `holds` times as many numbers as in a group's fit in the room.

    Where passes are kept each group's solutions are.
    """
    questions = problem.questions
    each = holds * problem.size * questions.element_size()
    size = max(1, min(len(questions), int(min(problem.room / each, 2**31))))

    def solved(whole: Problem, part: slice) -> dict[str, Tensor]:
        found = solve(whole.questions[part])
        facts = torch.tensor([found.iterations, found.residual, found.converged], dtype=torch.float64)
        return {"vectors": found.vectors, "facts": facts}

    vectors, facts = torch.empty_like(questions), []
    groups: Iterator[tuple[slice, dict[str, Tensor]]]
    if problem.lasting is None:
        parts = (slice(begin, min(begin + size, len(questions))) for begin in range(0, len(questions), size))
        groups = ((part, solved(problem, part)) for part in parts)
    else:
        groups = problem.lasting.each("solutions", problem, len(questions), solved, size)
    for part, arrays in groups:
        vectors[part] = arrays["vectors"].to(vectors)
        facts.append(arrays["facts"])
    made, residual, converged = torch.stack(facts).T
    return Solved(vectors, int(made.max()), residual.max().item(), bool(converged.all()))


def _answered(problem: Problem, solved: Solved, units: str, spectrum: dict[str, float]) -> Answer:
    scores = problem.dots(solved.vectors) / problem.n
    return Answer(scores, units, solved.vectors, {**_facts(solved), "eigenvalues": spectrum})


def _facts(solved: Solved) -> dict[str, float | bool]:
    return {"iterations": solved.iterations, "residual": solved.residual, "converged": solved.converged}


def _residual_of(problem: Problem, vectors: Tensor) -> float:
    questions = problem.questions
    norm = questions.norm(dim=1)
    off = (questions - problem.damped(vectors)).norm(dim=1)
    return (off / norm.where(norm > 0, 1.0)).max().item() if len(questions) else 0.0


def _require_explicit(problem: Problem, name: str) -> None:
    if problem.size > LARGEST_EXPLICIT:
        raise BadInput(
            f"{name!r} writes down the Hessian of {problem.size:,} parameters, more than {LARGEST_EXPLICIT:,}; take "
            "method='cg' or 'ekfac', or fewer layers"
        )
    require(4 * 8 * problem.size**2, f"a Hessian of {problem.size:,} parameters", problem.parameters.device)


def _require_positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise BadInput(f"{name} is more than 0; got {value}")
