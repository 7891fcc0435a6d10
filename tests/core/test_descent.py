"""Steepest descent and L-BFGS: against closed forms, each image by itself, and no loss that rises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchloupe_core.descent import Descent, Norm, steepest
from torchloupe_core.lbfgs import LBFGS


@pytest.mark.parametrize("norm", ["linf", "l2", "mean"])
def test_steps_have_the_length_asked_for(norm: Norm) -> None:
    tensor = torch.zeros(3, 2, 5, dtype=torch.float64)
    gradient = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient[1] *= 1e-25  # faint, but a direction all the same
    gradient[2] = 0
    steepest(norm)([tensor], 0.1).step([gradient])
    assert (tensor[:2] * gradient[:2] <= 0).all() and not tensor[2].any()
    for row in tensor[:2]:
        length = {"linf": row.abs().max(), "l2": row.norm(), "mean": row.abs().mean()}[norm]
        assert length.item() == pytest.approx(0.1)
    if norm != "linf":
        torch.testing.assert_close(tensor[0] / tensor[0].norm(), -gradient[0] / gradient[0].norm())


def minimised(optimizer: Descent, tensors: list[Tensor], loss: object, steps: int) -> Tensor:
    """The losses step by step, `[steps, n]`."""
    history = []
    for _ in range(steps):
        optimizer.begin()
        with torch.enable_grad():
            losses = loss(*tensors)  # type: ignore[operator]
            gradients = torch.autograd.grad(losses.sum(), tensors)
        known = optimizer.step(gradients, losses.detach())
        history.append(losses.detach() if known is None else known)
    return torch.stack(history)


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x).square().sum(1) + 100 * (y - x.square()).square().sum(1)


def test_lbfgs_finds_the_bottom_of_a_valley_and_never_rises() -> None:
    start = [torch.tensor([[-1.2], [0.5], [3.0]]).double(), torch.tensor([[1.0], [-2.0], [-4.0]]).double()]
    tensors = [one.clone().requires_grad_(True) for one in start]
    history = minimised(LBFGS(tensors), tensors, rosenbrock, 120)
    assert (history.diff(dim=0) <= 0).all()
    torch.testing.assert_close(
        torch.cat([one.detach() for one in tensors], 1), torch.ones(3, 2).double(), atol=1e-5, rtol=0
    )
    with torch.no_grad():  # the tensors are where the last loss was seen
        torch.testing.assert_close(rosenbrock(*tensors), history[-1])


def test_each_image_goes_its_own_way() -> None:
    start = [torch.tensor([[-1.2], [0.5]]).double(), torch.tensor([[1.0], [-2.0]]).double()]
    both = [one.clone().requires_grad_(True) for one in start]
    together = minimised(LBFGS(both), both, rosenbrock, 40)
    alone = [one[1:].clone().requires_grad_(True) for one in start]
    torch.testing.assert_close(
        minimised(LBFGS(alone), alone, rosenbrock, 40)[:, 0], together[:, 1], rtol=1e-6, atol=1e-9
    )


def test_lbfgs_is_that_of_torch_on_a_quadratic() -> None:
    """With exact curvature in memory both reach the minimum of a quadratic of six numbers at once."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, goal = root @ root.T + torch.eye(6).double(), torch.randn(1, 6, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return torch.einsum("ni,ij,nj->n", x - goal, matrix, x - goal)

    mine = [torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)]
    history = minimised(LBFGS(mine), mine, loss, 60)
    theirs = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.LBFGS(
        [theirs], max_iter=60, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        value = loss(theirs).sum()
        (theirs.grad,) = torch.autograd.grad(value, theirs)
        return value

    reference.step(closure)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mine[0].detach(), theirs.detach(), atol=1e-6, rtol=0)
    assert history[-1].item() < 1e-10


def test_a_minimum_is_left_alone() -> None:
    tensors = [torch.ones(2, 1).double().requires_grad_(True) for _ in range(2)]
    history = minimised(LBFGS(tensors), tensors, rosenbrock, 5)
    assert not history.any() and all(torch.equal(one, torch.ones(2, 1).double()) for one in tensors)
