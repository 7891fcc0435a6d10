"""Solving with a symmetric matrix that is only known by its products, for several right-hand sides at once.

`times` takes vectors `[m, P]` to the matrix times each, `[m, P]`. Every solver says how well it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, NotApplicable

__all__ = [
    "ROUNDING",
    "Krylov",
    "Solved",
    "Times",
    "conjugate_gradients",
    "factored",
    "indefinite",
    "lanczos",
    "neumann",
    "singular",
]

Times = Callable[[Tensor], Tensor]

ROUNDING = 1e-12  # of the largest eigenvalue: what is smaller is zero
PATIENCE = 25  # steps that a residual may grow before a series counts as divergent


@dataclass(frozen=True)
class Solved:
    """`vectors [m, P]`, and how they were come by: iterations, and the largest |b - Ax| / |b| of the m."""

    vectors: Tensor
    iterations: int
    residual: float
    converged: bool = True


def conjugate_gradients(times: Times, b: Tensor, *, tolerance: float, iterations: int) -> Solved:
    """Hestenes and Stiefel 1952, each right-hand side with its own step, until all residuals are small.

    The best solution so far is kept, as rounding lets residuals rise again. Raises `NotApplicable` if a direction of
    negative curvature is met.
    """
    norm = b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    best, least = x.clone(), (r.norm(dim=1) / norm)
    squares, made = r.square().sum(1), 0
    for made in range(1, iterations + 1):  # noqa: B007  (how many there were)
        product = times(p)
        curvature = (p * product).sum(1)
        if bool((curvature < -ROUNDING * p.norm(dim=1) * product.norm(dim=1)).any()):
            worst = (curvature / p.square().sum(1).clamp(min=torch.finfo(b.dtype).tiny)).min().item()
            raise indefinite(worst, "at most")
        moving = (curvature > 0) & (least > tolerance)
        alpha = torch.where(moving, squares / curvature.where(curvature > 0, 1.0), 0.0)[:, None]
        x, r = x + alpha * p, r - alpha * product
        now = r.norm(dim=1) / norm
        better = now < least
        best[better], least = x[better], torch.minimum(now, least)
        if not moving.any() or bool((least <= tolerance).all()):
            break
        before, squares = squares, r.square().sum(1)
        p = r + (squares / before.where(before > 0, 1.0))[:, None] * p
    residual = _residual(times, best, b)
    return Solved(best, made, residual, residual <= max(2 * tolerance, 1e-10))


def neumann(times: Times, b: Tensor, *, scale: float, depth: int, tolerance: float, batches: bool = False) -> Solved:
    """The series h <- b + h - A h / scale, answer h / scale: LiSSA (Agarwal et al. 2017).

    batches: whether each product is of other images, so that the residual is only noise and all `depth` steps are
    made; the last half of them is averaged. Raises `BadInput` where the series diverges.
    """
    norm = b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
    h, mean, counted = b.clone(), torch.zeros_like(b), 0
    least, grown, step, residual = math.inf, 0, 0, math.inf
    for step in range(1, depth + 1):
        following = b + h - times(h) / scale
        residual = ((following - h).norm(dim=1) / norm).max().item()  # is b - A (h / scale)
        if not math.isfinite(residual) or residual > 1e6:
            raise _divergent(step, scale)
        grown = 0 if residual < least else grown + 1
        least = min(least, residual)
        if grown > PATIENCE and not batches and residual > 2 * least:
            raise _divergent(step, scale)
        if residual <= tolerance and not batches:
            break
        h = following
        if batches and step > depth // 2:
            mean, counted = mean + h, counted + 1
    answer = (mean / counted if counted else h) / scale
    return Solved(answer, step, residual, residual <= tolerance)


@dataclass(frozen=True)
class Krylov:
    """An orthonormal basis `[k, P]` of vectors, on which the matrix is `tridiagonal [k, k]`."""

    basis: Tensor
    tridiagonal: Tensor

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Approximate eigenvalues `[k]`, rising, and their vectors `[k, P]`."""
        values, vectors = torch.linalg.eigh(self.tridiagonal)
        return values, vectors.T @ self.basis


def lanczos(times: Times, size: int, steps: int, like: Tensor, seed: int = 0) -> Krylov:
    """Lanczos 1950 from a random vector, every new direction made orthogonal to all before, twice."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(size, generator=generator, dtype=torch.float64).to(like)
    basis, along, across = [q / q.norm()], list[Tensor](), list[Tensor]()
    for _ in range(min(steps, size)):
        product = times(basis[-1][None])[0]
        along.append(basis[-1] @ product)
        held = torch.stack(basis)
        for _ in range(2):
            product = product - held.T @ (held @ product)
        length = product.norm()
        if len(along) == min(steps, size) or length <= 1e-10 * torch.stack(along).abs().max():
            break
        across.append(length)
        basis.append(product / length)
    tridiagonal = torch.diag(torch.stack(along))
    if across:
        tridiagonal = tridiagonal + torch.diag(torch.stack(across), 1) + torch.diag(torch.stack(across), -1)
    return Krylov(torch.stack(basis), tridiagonal)


def factored(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a matrix `[P, P]`. Raises `NotApplicable` if it is singular or indefinite."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if int(info) or bool(diagonal.min() <= 1e-7 * diagonal.max()):
        eigenvalues = torch.linalg.eigvalsh(matrix)
        least, most = eigenvalues[0].item(), eigenvalues[-1].item()
        if least < -1e-9 * abs(most):
            raise indefinite(least)
        if least <= ROUNDING * most:
            raise singular(eigenvalues)
    return factor


def singular(eigenvalues: Tensor) -> NotApplicable:
    """The error for a Hessian that has no inverse."""
    least, most = eigenvalues.min().item(), eigenvalues.max().item()
    return NotApplicable(
        f"the Hessian is singular: its eigenvalues go from {least:.2g} to {most:.2g}; give the weight_decay of the "
        f"training, or damping, as {1e-3 * most:.1g}, or take method='cg', which keeps to directions gradients have"
    )


def indefinite(eigenvalue: float, how: str = "about") -> NotApplicable:
    """The error for a Hessian with a negative eigenvalue, which a step of Newton's would follow uphill."""
    return NotApplicable(
        f"the Hessian is indefinite: its smallest eigenvalue is {how} {eigenvalue:.3g}, so the model is at no minimum "
        f"of this loss; take damping above {-eigenvalue:.2g}, or curvature='gauss_newton' where the loss is convex in "
        "the logits"
    )


def _residual(times: Times, x: Tensor, b: Tensor) -> float:
    """The largest |b - Ax| / |b|, computed anew: that of the recursion forgets rounding."""
    norm = b.norm(dim=1)
    off = (b - times(x)).norm(dim=1)
    return (off / norm.where(norm > 0, 1.0)).max().item() if len(b) else 0.0


def _divergent(step: int, scale: float) -> BadInput:
    return BadInput(
        f"lissa diverged at step {step}: with scale={scale:.3g} the largest eigenvalue of the damped Hessian over the "
        "scale is above 2. Leave scale= out and it is chosen from that eigenvalue, or take method='cg'"
    )
