"""Losses and their derivatives, against autograd and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.losses import LOSSES, Loss, as_loss


def own_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]


def cases() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 4, generator=generator, dtype=torch.float64) * 3, torch.randint(
        0, 4, (7,), generator=generator
    )


@pytest.mark.parametrize("loss", [*LOSSES, own_cross_entropy])
def test_derivatives_are_those_of_autograd(loss: Any) -> None:
    logits, labels = cases()
    found = as_loss(loss)
    for row in range(len(logits)):

        def of(one: Tensor, row: int = row) -> Tensor:
            return found(one[None], labels[row : row + 1])[0]

        gradient = torch.autograd.functional.jacobian(of, logits[row])
        curvature = torch.autograd.functional.hessian(of, logits[row])
        torch.testing.assert_close(found.gradient(logits, labels)[row], gradient)
        torch.testing.assert_close(found.curvature(logits, labels)[row], curvature)


@pytest.mark.parametrize("loss", [*LOSSES, own_cross_entropy])
def test_curved_is_the_curvature_times_directions(loss: Any) -> None:
    logits, labels = cases()
    found = as_loss(loss)
    directions = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.einsum("nkl,mnl->mnk", found.curvature(logits, labels), directions)
    torch.testing.assert_close(found.curved(logits, labels, directions), expected)


@pytest.mark.parametrize("loss", [*LOSSES, own_cross_entropy])
def test_a_root_of_the_curvature(loss: Any) -> None:
    logits, labels = cases()
    root = as_loss(loss).root(logits, labels)
    torch.testing.assert_close(root @ root.transpose(1, 2), as_loss(loss).curvature(logits, labels))


def test_a_loss_that_is_not_convex_has_no_root() -> None:
    logits, labels = cases()
    with pytest.raises(NotApplicable, match=r"loss concave is not convex in the logits.*curvature='hessian'"):
        as_loss(concave).root(logits, labels)


def concave(logits: Tensor, labels: Tensor) -> Tensor:
    return -own_cross_entropy(logits, labels)


def test_a_loss_of_ones_own_equals_the_named_one() -> None:
    logits, labels = cases()
    torch.testing.assert_close(as_loss(own_cross_entropy)(logits, labels), as_loss("cross_entropy")(logits, labels))


def test_squared_with_one_output_pulls_it_to_the_label() -> None:
    logits, labels = torch.tensor([[1.5], [0.0]]), torch.tensor([3, -1])
    torch.testing.assert_close(as_loss("squared")(logits, labels), torch.tensor([1.125, 0.5]))
    torch.testing.assert_close(as_loss("squared").gradient(logits, labels), torch.tensor([[-1.5], [1.0]]))


def test_what_is_no_loss_says_what_one_is() -> None:
    logits, labels = cases()
    with pytest.raises(UnknownName, match="cross_entropy"):
        as_loss("cross entropy")
    with pytest.raises(BadInput, match=r"function \(logits, labels\)"):
        as_loss(3)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"loss cross_entropy gives shape \[\] for 7 images.*reduction='none'"):
        as_loss(F.cross_entropy)(logits, labels)
    assert as_loss(None) is LOSSES["cross_entropy"] and isinstance(as_loss(own_cross_entropy), Loss)
