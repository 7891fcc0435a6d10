"""Solving by products alone, against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.methods.influence.solvers import conjugate_gradients, factored, lanczos, neumann


def matrix(eigenvalues: list[float], seed: int = 0) -> Tensor:
    size = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def right_hand_sides(size: int, m: int = 4) -> Tensor:
    return torch.randn(m, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


SPREAD = [10.0 ** (-n / 4) for n in range(12)]


def test_conjugate_gradients_solve_each_right_hand_side() -> None:
    a, b = matrix(SPREAD), right_hand_sides(12)
    b[2] = 0  # nothing asked, nothing found
    b[3] = a @ b[1] * 1e-9
    solved = conjugate_gradients(lambda v: v @ a, b, tolerance=1e-10, iterations=200)
    torch.testing.assert_close(solved.vectors, torch.linalg.solve(a, b.T).T, rtol=1e-7, atol=1e-12)
    assert solved.converged and solved.residual < 1e-9 and solved.iterations < 40
    assert (solved.vectors[2] == 0).all()


def test_conjugate_gradients_say_how_far_they_came() -> None:
    a, b = matrix(SPREAD), right_hand_sides(12)
    solved = conjugate_gradients(lambda v: v @ a, b, tolerance=1e-10, iterations=3)
    off = (b - solved.vectors @ a).norm(dim=1) / b.norm(dim=1)
    assert not solved.converged and solved.iterations == 3
    assert solved.residual == pytest.approx(off.max().item())


def test_negative_curvature_is_refused_by_name() -> None:
    a, b = matrix([*SPREAD, -0.5]), right_hand_sides(13)
    with pytest.raises(NotApplicable, match=r"indefinite.*damping above.*curvature='gauss_newton'"):
        conjugate_gradients(lambda v: v @ a, b, tolerance=1e-10, iterations=200)
    with pytest.raises(NotApplicable, match=r"indefinite: its smallest eigenvalue is about -0\.5.*damping above 0\.5"):
        factored(a)


def test_a_singular_matrix_is_refused_with_what_helps() -> None:
    with pytest.raises(NotApplicable, match=r"singular.*weight_decay.*damping, as 0\.001"):
        factored(matrix([1.0, 0.5, 0.0]))
    assert factored(matrix([1.0, 0.5, 1e-9])).shape == (3, 3)


def test_the_series_of_lissa() -> None:
    a, b = matrix(SPREAD[:6]), right_hand_sides(6)
    solved = neumann(lambda v: v @ a, b, scale=1.1, depth=5_000, tolerance=1e-9)
    torch.testing.assert_close(solved.vectors, torch.linalg.solve(a, b.T).T, rtol=1e-6, atol=1e-9)
    off = (b - solved.vectors @ a).norm(dim=1) / b.norm(dim=1)
    assert solved.converged and off.max().item() == pytest.approx(solved.residual, rel=0.3)
    early = neumann(lambda v: v @ a, b, scale=1.1, depth=5, tolerance=1e-9)
    assert not early.converged and early.iterations == 5 and early.residual > 0.01


@pytest.mark.parametrize("scale", [0.49, 0.45, 0.01])
def test_a_divergent_series_is_never_an_answer(scale: float) -> None:
    a, b = matrix(SPREAD[:6]), right_hand_sides(6)
    with pytest.raises(BadInput, match=r"lissa diverged at step \d+: with scale=.*method='cg'"):
        neumann(lambda v: v @ a, b, scale=scale, depth=5_000, tolerance=1e-9)


def test_lanczos_finds_extreme_eigenvalues_and_their_vectors() -> None:
    a = matrix([*torch.linspace(0.1, 1, 60).tolist(), 3.0, 7.0, -2.0])
    values, vectors = lanczos(lambda v: v @ a, 63, 40, a[0]).ritz()
    assert values[-1].item() == pytest.approx(7, rel=1e-9) and values[-2].item() == pytest.approx(3, rel=1e-9)
    assert values[0].item() == pytest.approx(-2, rel=1e-9)
    torch.testing.assert_close(a @ vectors[-1], 7 * vectors[-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(40, dtype=torch.float64))


def test_lanczos_ends_where_the_matrix_has_no_more_to_show() -> None:
    a = matrix([2.0, 2.0, 2.0, 5.0, 5.0])
    values, _ = lanczos(lambda v: v @ a, 5, 5, a[0]).ritz()
    torch.testing.assert_close(values, torch.tensor([2.0, 5.0], dtype=torch.float64))
