"""dattri: influence functions, DataInf, TracIn and TRAK.

Its curvature is that of the mean loss, with weight decay and damping on the diagonal; its scores are ours once divided
by the number of training images. It sums inverses over batches, so curvature is taken over one batch of all images,
held in memory. Its defaults for projections are a dictionary that every call changes: all of them are given each time.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.memory import require
from torchloupe_core.methods.influence.apart import Copied, added_of, images_of, through_the_model
from torchloupe_core.methods.influence.checkpoints import PROJECTED, STEPS, Checkpoint, rates_of
from torchloupe_core.methods.influence.functions import CHANGE
from torchloupe_core.methods.influence.network import NetworkProblem
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT, Answer, Problem
from torchloupe_core.registry import method

__all__ = ["arnoldi", "cg", "datainf", "explicit", "tracin", "trak"]

BATCH, TESTS = 64, 8  # images at once; tests, which are solved together
_KOH = "Koh and Liang 2017, Understanding Black-box Predictions via Influence Functions"


@method("influence", "dattri.explicit", cost="1 Hessian of P x P", paper=_KOH)
def explicit(problem: Problem) -> Answer:
    """The Hessian of the loss, written down and inverted; at most 5,000 parameters."""
    asked = through_the_model(problem, "dattri")
    if asked.size > LARGEST_EXPLICIT:
        raise BadInput(
            f"'dattri.explicit' writes down the Hessian of {asked.size:,} parameters, more than {LARGEST_EXPLICIT:,}; "
            "take method='ekfac', or fewer layers"
        )
    return _curved(asked, "IFAttributorExplicit", regularization=added_of(asked, "dattri"))


@method("influence", "dattri.cg", cost="max_iter (10) Hessian products a test", paper=f"{_KOH}, section 3")
def cg(problem: Problem, *, max_iter: int = 10, tol: float = 1e-7) -> Answer:
    """Conjugate gradients with the Hessian; how far they came it does not tell."""
    asked = through_the_model(problem, "dattri")
    added = added_of(asked, "dattri")
    return _curved(asked, "IFAttributorCG", regularization=added, max_iter=max_iter, tol=tol)


@method(
    "influence",
    "dattri.arnoldi",
    cost="max_iter (100) Hessian products",
    paper="Schioppa et al. 2022, Scaling Up Influence Functions",
    random=True,
)
def arnoldi(problem: Problem, *, proj_dim: int = 100, max_iter: int = 100, tol: float = 1e-7) -> Answer:
    """The Hessian on its leading eigenvectors, as `max_iter` products show them."""
    asked = through_the_model(problem, "dattri")
    options: dict[str, Any] = {"proj_dim": proj_dim, "max_iter": max_iter, "tol": tol, "seed": problem.seed}
    return _curved(asked, "IFAttributorArnoldi", single=True, regularization=added_of(asked, "dattri"), **options)


@method(
    "influence",
    "dattri.datainf",
    cost="1 pass for each batch of training and of test images",
    paper="Kwon et al. 2024, DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models",
)
def datainf(problem: Problem) -> Answer:
    """For each layer the mean of inverses, one of each training image's gradient, in place of the inverse of the mean.

    Raises `BadInput` without weight decay and damping.
    """
    asked = through_the_model(problem, "dattri")
    added = added_of(asked, "dattri")
    if not added > 0:
        raise BadInput("'dattri.datainf' divides by what is added to the curvature; give weight_decay or damping")
    return _curved(asked, "IFAttributorDataInf", batch=BATCH, single=True, regularization=added)


@method(
    "influence",
    "dattri.tracin",
    needs=("checkpoints",),
    cost="1 pass for each checkpoint and batch of tests",
    paper="Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient Descent",
)
def tracin(
    problem: Problem,
    *,
    checkpoints: Sequence[Checkpoint] = (),
    rates: Sequence[float] | float = 1.0,
    normalized: bool = False,
) -> Answer:
    """As the native tracin; normalized: of gradients of length 1."""
    asked, weights = through_the_model(problem, "dattri"), rates_of(checkpoints, rates)
    _require_loss(asked, "dattri.tracin")
    task = _task(asked, checkpoints=[one().module.state_dict() for one in checkpoints])
    with _quietly():
        made = _algorithm().TracInAttributor(task, torch.tensor(weights), normalized, device=_device(asked))
        made.projector_kwargs = None  # gradients as they are
        scores = made.attribute(_training(asked, BATCH), _testing(asked))
    facts = {"checkpoints": len(checkpoints), "rates": weights}
    return Answer(scores.T.to(asked.parameters) / asked.n, STEPS, diagnostics=facts)


@method(
    "influence",
    "dattri.trak",
    cost="1 pass for each model",
    paper="Park et al. 2023, TRAK: Attributing Model Behavior at Scale",
    random=True,
)
def trak(problem: Problem, *, dims: int = 512, checkpoints: Sequence[Checkpoint] = ()) -> Answer:
    """As the native trak, with its own projection; damping times the number of images is added to the kernel."""
    asked = through_the_model(problem, "dattri")
    if asked.loss.kind != "cross_entropy":
        raise NotApplicable(f"trak is made for the cross-entropy; the loss is {asked.loss.name}")
    if dims < 1:
        raise BadInput(f"dims is at least 1; got {dims}")
    states = [one().module.state_dict() for one in checkpoints] or None
    _require_loss(asked, "dattri.trak")
    task = _task(asked, checkpoints=states, loss=_margin)
    copied, free = task.model, asked.size

    def certain(state: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """The probability of one image's label."""
        logits: Tensor = functional_call(copied, state, (batch[0][None],))
        return logits.softmax(1)[0, batch[1].long()]

    projector = {"proj_dim": dims, "proj_max_batch_size": 32, "proj_seed": problem.seed, "device": _device(asked)}
    with _quietly():
        added = (asked.given_damping or 0.0) * asked.n / free
        made = _algorithm().TRAKAttributor(
            task, certain, projector_kwargs=projector, device=_device(asked), regularization=added
        )
        made.cache(_training(asked, BATCH))
        scores = made.attribute(_testing(asked))
    return Answer(
        -scores.T.to(asked.parameters), PROJECTED, diagnostics={"dims": dims, "models": len(states) if states else 1}
    )


def _curved(
    problem: NetworkProblem, name: str, *, batch: int | None = None, single: bool = False, **options: Any
) -> Answer:
    """Influence with a curvature of dattri's, in our units. batch: of the images that the curvature is of.

    single: compute in float32, as some of its methods always do. It solves for the tests anew for every batch of
    training images, so there is one of these.
    """
    item = torch.finfo(problem.handle.dtype).bits // 8
    needed = 2 * item * problem.size * (problem.n + len(problem.tests))
    require(needed, f"the gradients of {problem.n:,} images", problem.handle.device, "take a native method, as 'ekfac'")
    kind = torch.float32 if single else problem.handle.dtype
    task = _task(problem, slopes=_slopes(problem), kind=kind)
    with _quietly():
        made = getattr(_algorithm(), name)(task, device=_device(problem), **options)
        made.cache(_training(problem, batch or problem.n, kind))
        scores = made.attribute(_training(problem, problem.n, kind), _testing(problem, kind))
    if not scores.isfinite().all():
        raise BadInput(
            f"dattri's {name} gives NaN or infinity: the curvature has fewer directions than it was asked for, or is "
            "singular; ask for fewer, or give more damping"
        )
    damping = problem.damping
    facts = {"damping": damping, "damping_chosen": problem.given_damping is None and damping > 0}
    return Answer(scores.T.to(problem.parameters) / problem.n, CHANGE, diagnostics=facts)


def _task(
    problem: NetworkProblem,
    *,
    checkpoints: list[dict[str, Tensor]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    slopes: Tensor | None = None,
    kind: torch.dtype | None = None,
) -> Any:
    """What is trained and what is asked, in dattri's terms, of batches and of single images.

    loss: in place of the problem's own. slopes: of what is asked by the logits, `[T, K]`, which serve at the model's
    own parameters; elsewhere it is the loss of the tests.
    """
    try:
        from dattri.task import AttributionTask
    except ImportError as error:
        raise MissingDependency.of("dattri", "peers") from error
    copied = Copied(problem).to(kind)
    of, asked = loss or problem.loss.of, problem.asked

    def logits_of(state: dict[str, Tensor], inputs: Tensor) -> Tensor:
        found: Tensor = functional_call(copied, state, (inputs if inputs.ndim == 4 else inputs[None],))
        return found

    def trained(state: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = logits_of(state, batch[0])
        return of(logits, batch[1].view(len(logits))).mean()

    def questioned(state: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = logits_of(state, batch[0])
        which = batch[1].view(len(logits))
        return asked.of(logits, which).sum() if slopes is None else (slopes[which] * logits).sum()

    states = [{f"model.{name}": one for name, one in state.items()} for state in checkpoints or ()]
    return AttributionTask(
        loss_func=trained, model=copied, checkpoints=states or copied.state_dict(), target_func=questioned
    )


def _slopes(problem: NetworkProblem) -> Tensor:
    """`[T, K]`: of what is asked of each test by its logits."""
    copied = Copied(problem)
    with torch.no_grad():
        logits = torch.cat([copied(block.inputs) for block in problem.tests.blocks(BATCH)])
    return problem.asked.slopes(logits)


def _require_loss(problem: NetworkProblem, name: str) -> None:
    """Raises `NotApplicable` for a target, whose slope differs between checkpoints."""
    if problem.asked.targets is not None:
        raise NotApplicable(f"'{name}' asks about the loss of the tests; for a target take the native method")


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`[N]`: log(p / (1 - p)) of the label."""
    own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)  # as vmap can do it
    return logits.where(own, 0).sum(1) - logits.masked_fill(own, -torch.inf).logsumexp(1)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Inside, nothing is printed, and no graph is kept beside the gradients that dattri takes by `torch.func`."""
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _training(problem: NetworkProblem, batch: int, kind: torch.dtype | None = None) -> DataLoader[Any]:
    labels = problem.labels.to(problem.handle.device)
    return DataLoader(TensorDataset(images_of(problem.images, "dattri").to(kind), labels), batch)


def _testing(problem: NetworkProblem, kind: torch.dtype | None = None) -> DataLoader[Any]:
    """The test images, each with its number in place of a label."""
    numbers = torch.arange(len(problem.tests), device=problem.handle.device)
    return DataLoader(TensorDataset(images_of(problem.tests, "dattri").to(kind), numbers), TESTS)


def _device(problem: Problem) -> str:
    return str(problem.handle.device)


def _algorithm() -> Any:
    try:
        import dattri.algorithm
    except ImportError as error:
        raise MissingDependency.of("dattri", "peers") from error
    return dattri.algorithm
