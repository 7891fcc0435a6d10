"""Kronfluence: EK-FAC as its authors scale it to language models.

Its modules wrap the model's and free them from gradients for good, so it is given a copy; its files go into a folder
that is gone afterwards. Its scores are in our units once they are divided by the number of training images.
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.methods.influence.apart import Copied, images_of, through_the_model
from torchloupe_core.methods.influence.functions import CHANGE
from torchloupe_core.methods.influence.network import NetworkProblem
from torchloupe_core.methods.influence.problem import Answer, Problem
from torchloupe_core.registry import method

__all__ = ["ekfac"]

BATCH = 64
NAME = "kronfluence"


@method(
    "influence",
    "kronfluence.ekfac",
    cost="3 passes",
    paper="Grosse et al. 2023, Studying Large Language Model Generalization with Influence Functions",
    random=True,
)
def ekfac(problem: Problem, *, empirical: bool = False, batch: int = BATCH) -> Answer:
    """EK-FAC of linear layers and convolutions; parameters of other layers take no part.

    empirical: the Fisher matrix from the labels, instead of labels that the model's probabilities draw. batch: images
    at once. For the cross-entropy. Without damping or weight decay a tenth of each layer's mean eigenvalue.
    """
    asked = through_the_model(problem, "kronfluence")
    if batch < 1:
        raise BadInput(f"batch is at least 1; got {batch}")
    if asked.loss.kind != "cross_entropy" and not empirical:
        raise NotApplicable("labels are drawn for the cross-entropy; for another loss give empirical=True")
    modules = [piece.module for piece in asked.pieces if piece.matrix and piece.groups == 1]
    left_out = [piece.module for piece in asked.pieces if piece.module not in modules]
    if not modules:
        raise NotApplicable("kronfluence follows linear layers and convolutions, and none is asked about")
    known = asked.given_damping is not None or asked.decayed
    added = _added(asked) if known else None
    scores = _scored(asked, modules, empirical, added, batch)
    facts = {"damping": 0.0 if added is None else added - float(asked.decay[0]), "damping_chosen": added is None}
    if added is None:
        facts["damping"] = float("nan")  # one for each layer, which it does not tell
    return Answer(scores / asked.n, CHANGE, diagnostics={**facts, "left_out": left_out})


def _added(problem: NetworkProblem) -> float:
    if bool((problem.decay != problem.decay[0]).any()):
        raise BadInput("kronfluence adds one number to the curvature; give one weight_decay for all parameters")
    return float(problem.decay[0]) + (problem.given_damping or 0.0)


def _scored(problem: NetworkProblem, modules: list[str], empirical: bool, added: float | None, batch: int) -> Tensor:
    """`[T, n]`, as it gives them."""
    analyzer, arguments, prepare = _kronfluence()
    train = TensorDataset(images_of(problem.images, "kronfluence"), problem.labels.to(problem.handle.device))
    images = images_of(problem.tests, "kronfluence")
    tests = TensorDataset(images, torch.arange(len(images), device=images.device))
    task = _task(problem, [f"model.{name}" for name in modules])
    quiet, level = logging.getLogger("kronfluence"), logging.getLogger("kronfluence").level
    quiet.setLevel(logging.ERROR)
    torch.manual_seed(problem.seed)
    kind = problem.handle.dtype
    types = {"activation_covariance_dtype": kind, "gradient_covariance_dtype": kind, "lambda_dtype": kind}
    fitting = arguments.FactorArguments(
        strategy="ekfac", use_empirical_fisher=empirical, per_sample_gradient_dtype=kind, **types
    )
    scoring = arguments.ScoreArguments(
        damping_factor=added, per_sample_gradient_dtype=kind, precondition_dtype=kind, score_dtype=kind
    )
    try:
        with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
            found = analyzer(
                NAME,
                prepare(Copied(problem), task),
                task,
                cpu=problem.handle.device.type == "cpu",
                log_level=logging.ERROR,
                disable_tqdm=True,
                output_dir=folder,
            )
            found.fit_all_factors(NAME, train, per_device_batch_size=batch, factor_args=fitting)
            found.compute_pairwise_scores(
                NAME,
                NAME,
                query_dataset=tests,
                train_dataset=train,
                per_device_query_batch_size=batch,
                per_device_train_batch_size=batch,
                score_args=scoring,
            )
            scores: Tensor = found.load_pairwise_scores(NAME)["all_modules"]
    finally:
        quiet.setLevel(level)
    return scores.to(problem.parameters)


def _task(problem: NetworkProblem, modules: list[str]) -> Any:
    """What is trained and what is asked, in kronfluence's terms."""
    from kronfluence.task import Task

    class Asked(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            inputs, labels = batch
            logits = model(inputs)
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
                return F.cross_entropy(logits, labels, reduction="sum")
            return problem.loss(logits, labels).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            inputs, which = batch
            return problem.asked.of(model(inputs), which).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

    return Asked()


def _kronfluence() -> Any:
    try:
        from kronfluence import arguments
        from kronfluence.analyzer import Analyzer, prepare_model
    except ImportError as error:
        raise MissingDependency.of("kronfluence", "peers") from error
    return Analyzer, arguments, prepare_model
