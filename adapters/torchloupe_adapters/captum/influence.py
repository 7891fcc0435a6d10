"""Captum's influence of training images: TracIn, and influence functions with the explicit Hessian or Arnoldi's method.

Captum's Hessian is of the *summed* loss, so what is added to it is n times our weight decay and damping, and its scores
then are ours. Everything happens on a copy of the model: Captum freezes parameters for good and loads checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.methods.influence.apart import Copied, added_of, images_of, through_the_model
from torchloupe_core.methods.influence.checkpoints import STEPS, Checkpoint, rates_of
from torchloupe_core.methods.influence.functions import CHANGE
from torchloupe_core.methods.influence.network import NetworkProblem
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT, Answer, Problem
from torchloupe_core.registry import method

__all__ = ["arnoldi", "naive", "tracin", "tracin_fast"]

BATCH = 64
_KOH = "Koh and Liang 2017, Understanding Black-box Predictions via Influence Functions"
_PRUTHI = "Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient Descent"


@method("influence", "captum.naive", cost="1 Hessian of P x P", paper=_KOH)
def naive(problem: Problem, *, projection_dim: int | None = None, hessian_inverse_tol: float = 0.0) -> Answer:
    """The Hessian itself, written down, and its `projection_dim` largest eigenvalues, all P unless given.

    Eigenvalues of the summed loss up to `hessian_inverse_tol` are left out, negative ones always.
    """
    asked = _network(problem)
    if asked.size > LARGEST_EXPLICIT:
        raise BadInput(
            f"'captum.naive' writes down the Hessian of {asked.size:,} parameters, more than {LARGEST_EXPLICIT:,}; "
            "take method='captum.arnoldi' or 'cg', or fewer layers"
        )
    options = {"projection_dim": projection_dim or asked.size, "hessian_inverse_tol": hessian_inverse_tol}
    return _curved(asked, _influence().NaiveInfluenceFunction, options)


@method(
    "influence",
    "captum.arnoldi",
    cost="arnoldi_dim (200) Hessian products",
    paper="Schioppa et al. 2022, Scaling Up Influence Functions",
    random=True,
)
def arnoldi(
    problem: Problem,
    *,
    projection_dim: int = 50,
    arnoldi_dim: int = 200,
    arnoldi_tol: float = 1e-1,
    hessian_inverse_tol: float = 0.0,
) -> Answer:
    """The Hessian on its `projection_dim` leading eigenvectors, as `arnoldi_dim` products show them."""
    asked = _network(problem)
    options: dict[str, Any] = {"projection_dim": projection_dim, "arnoldi_dim": arnoldi_dim, "arnoldi_tol": arnoldi_tol}
    options |= {"hessian_inverse_tol": hessian_inverse_tol, "seed": problem.seed}
    return _curved(asked, _arnoldi(), options)


@method("influence", "captum.tracin", needs=("checkpoints",), cost="1 pass for each checkpoint", paper=_PRUTHI)
def tracin(problem: Problem, *, checkpoints: Sequence[Checkpoint] = (), rates: Sequence[float] | float = 1.0) -> Answer:
    """TracInCP: as the native tracin."""
    asked, copied = _network(problem), Copied(_network(problem))
    loaded = _Loaded(checkpoints, rates_of(checkpoints, rates))
    with torch.enable_grad():
        found = _influence().TracInCP(
            copied,
            _training(asked),
            list(range(len(checkpoints))),
            checkpoints_load_func=loaded,
            layers=_layers(asked),
            loss_fn=_PerImage(asked.loss),
            test_loss_fn=_PerImage(asked.asked.of),
            batch_size=BATCH,
        )
        scores = found.influence(_testing(asked))
    return Answer(
        scores.detach() / asked.n, STEPS, diagnostics={"checkpoints": len(checkpoints), "rates": loaded.rates}
    )


@method(
    "influence",
    "captum.tracin_fast",
    needs=("checkpoints", "linear_head"),
    cost="1 forward pass for each checkpoint",
    paper=_PRUTHI + ", section 4.3",
)
def tracin_fast(
    problem: Problem, *, checkpoints: Sequence[Checkpoint] = (), rates: Sequence[float] | float = 1.0
) -> Answer:
    """TracInCP through the weights of the last linear layer, from what it reads and what comes back to it.

    Captum leaves the layer's bias out, which the native tracin takes in.
    """
    asked, copied = _network(problem), Copied(_network(problem))
    modules = [piece.module for piece in asked.pieces]
    if len(modules) != 1 or not isinstance(asked.handle.module.get_submodule(modules[0]), nn.Linear):
        raise NotApplicable(
            f"'captum.tracin_fast' goes through one linear layer, the last; here through {', '.join(modules)}; leave "
            "layers= out, or take 'captum.tracin'"
        )
    loaded = _Loaded(checkpoints, rates_of(checkpoints, rates))
    with torch.enable_grad():
        found = _influence().TracInCPFast(
            copied,
            f"model.{modules[0]}",
            _training(asked),
            list(range(len(checkpoints))),
            checkpoints_load_func=loaded,
            loss_fn=_Summed(asked.loss),
            test_loss_fn=_Summed(asked.asked.of),
            batch_size=BATCH,
        )
        scores = found.influence(_testing(asked))
    return Answer(
        scores.detach() / asked.n, STEPS, diagnostics={"checkpoints": len(checkpoints), "rates": loaded.rates}
    )


def _curved(problem: NetworkProblem, kind: Any, options: dict[str, Any]) -> Answer:
    """Influence with a Hessian of Captum's, in our units."""
    damping, added = problem.damping, added_of(problem, "Captum")
    with torch.enable_grad():
        found = kind(
            Copied(_network(problem)),
            _training(problem),
            checkpoint="",
            checkpoints_load_func=lambda model, path: 1.0,
            layers=_layers(problem),
            loss_fn=_PerImage(problem.loss),
            test_loss_fn=_PerImage(problem.asked.of),
            batch_size=BATCH,
            hessian_reg=problem.n * added,
            **options,
        )
        scores = found.influence(_testing(problem))
    facts = {"damping": damping, "damping_chosen": problem.given_damping is None and damping > 0}
    return Answer(scores.detach(), CHANGE, diagnostics={**facts, "hessian_reg": problem.n * added})


class _PerImage(nn.Module):
    """A loss in the shape Captum recognises: one number for each image."""

    reduction = "none"

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.of(logits, labels)


class _Summed(_PerImage):
    reduction = "sum"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.of(logits, labels).sum()


class _Loaded:
    """Loads the checkpoint of a number into the copy; gives its rate."""

    def __init__(self, checkpoints: Sequence[Checkpoint], rates: Sequence[float]) -> None:
        self.checkpoints, self.rates = checkpoints, list(rates)

    def __call__(self, copied: Copied, number: int) -> float:
        handle: Handle = self.checkpoints[number]()
        copied.model.load_state_dict(handle.module.state_dict())
        return self.rates[number]


def _network(problem: Problem) -> NetworkProblem:
    return through_the_model(problem, "Captum")


def _layers(problem: NetworkProblem) -> list[str] | None:
    """The modules as Captum names them, None for all parameters."""
    every = {name for name, _ in problem.handle.module.named_parameters()}
    if every == set(problem.model_gradients.names):
        return None
    for piece in problem.pieces:
        own = {
            f"{piece.module}.{name}" for name, _ in problem.handle.module.get_submodule(piece.module).named_parameters()
        }
        if not piece.module or own != set(piece.names):
            raise NotApplicable(
                f"Captum takes whole layers, and only some parameters of {piece.module or 'the model itself'!r} are "
                "asked about; take a native method, as 'cg'"
            )
    return [f"model.{piece.module}" for piece in problem.pieces]


def _training(problem: NetworkProblem) -> DataLoader[Any]:
    images = images_of(problem.images, "Captum")
    return DataLoader(TensorDataset(images, problem.labels.to(problem.handle.device)), BATCH)


def _testing(problem: NetworkProblem) -> tuple[Tensor, Tensor]:
    """The test images, each with its number in place of a label."""
    return images_of(problem.tests, "Captum"), torch.arange(len(problem.tests), device=problem.handle.device)


def _influence() -> Any:
    try:
        import captum.influence
    except ImportError as error:
        raise MissingDependency.of("captum", None) from error
    return captum.influence


def _arnoldi() -> Any:
    """A class that Captum does not export."""
    try:
        from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
    except ImportError as error:
        raise MissingDependency.of("captum>=0.8", None) from error
    return ArnoldiInfluenceFunction
