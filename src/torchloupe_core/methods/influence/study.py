"""A question about influence made ready: data read, labels checked, the problem set up, the answer judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.labels import Given, labels_of, require_classes
from torchloupe_core.losses import Loss
from torchloupe_core.memory import require
from torchloupe_core.methods.influence.head import Head, HeadProblem, Rows, linear_head, read_rows, require_linear
from torchloupe_core.methods.influence.lasting import Lasting
from torchloupe_core.methods.influence.network import Curvature, NetworkProblem
from torchloupe_core.methods.influence.problem import LARGEST_EXPLICIT, Answer, Problem
from torchloupe_core.methods.influence.questions import Questions
from torchloupe_core.methods.influence.sample_gradients import SampleGradients
from torchloupe_core.methods.influence.spot_check import STATIONARY, spot_check
from torchloupe_core.methods.influence.training_images import TrainingImages
from torchloupe_core.targets import Target

__all__ = ["Asked", "Decay", "Kept", "Study", "head_study", "logits_of", "needed", "network_study", "shape_of"]

Decay = float | Mapping[str, float] | None
Report = Callable[[int, int], None]

SOME = 32  # test images through the model at once


@dataclass(frozen=True)
class Asked:
    """What a user asks, beside the model and the data."""

    loss: Loss
    targets: Sequence[Target] | None = None
    labels: Given = None
    test_labels: Given = None
    weight_decay: Decay = None
    damping: float | None = None
    seed: int = 0

    def decay_of(self, name: str) -> float:
        """The weight decay of one parameter tensor."""
        if isinstance(self.weight_decay, Mapping):
            return float(self.weight_decay.get(name, 0.0))
        return float(self.weight_decay or 0.0)

    @property
    def facts(self) -> dict[str, Any]:
        """All of it in words, to compare two questions by."""
        targets = None if self.targets is None else [str(one) for one in self.targets]
        regular = {"weight decay": self.weight_decay, "damping": self.damping}
        return {"loss": self.loss.name, "targets": targets, "seed": self.seed, **regular}

    def check(self, names: Sequence[str]) -> None:
        """Raises an error for a negative number, or a weight decay of parameters that take no part."""
        decays = self.weight_decay if isinstance(self.weight_decay, Mapping) else {"": self.weight_decay or 0.0}
        for name, value in decays.items():
            if name and name not in names:
                raise UnknownName.of("parameter", name, names)
            if not 0 <= value < float("inf"):
                raise BadInput(f"weight_decay is at least 0; got {value}")
        if self.damping is not None and not 0 <= self.damping < float("inf"):
            raise BadInput(f"damping is at least 0; got {self.damping}")


@dataclass(frozen=True)
class Kept:
    """A problem and the vectors `[T, P]` that its scores are products with: what pixels are asked with later."""

    problem: Problem
    vectors: Tensor
    data: DataSet
    handle: Handle

    def only(self, row: int) -> Kept:
        """That of one test image."""
        return replace(self, vectors=self.vectors[row : row + 1])

    def pixels(self, row: int, train: int, label: Tensor) -> tuple[Tensor, Tensor]:
        """`[1, C, H, W]`: a score's gradient by a training image's pixels, and the image as it is shown."""
        sample = self.data.read(train)
        if sample.inputs is None:
            raise BadInput(f"{self.data.name(train)} was read before and cannot be now: {sample.error}")
        inputs = sample.inputs[None].to(self.handle.device, self.handle.dtype)
        with self.handle.borrow():
            found = self.problem.pixels(self.vectors[row], inputs, label[None]) / self.problem.n
        return found.to("cpu", torch.float32), self.handle.spec.display(inputs)


@dataclass
class Study:
    """The data as read, and the problem that methods answer."""

    problem: Problem
    layers: tuple[str, ...]
    train_indices: Tensor
    test_indices: Tensor
    train_labels: Tensor
    test_labels: Tensor
    logits: Tensor  # [T, K] of the test images
    skipped: dict[str, str]
    about: tuple[str, ...]

    def judged(self, answer: Answer, check: int) -> dict[str, Any]:
        """The diagnostics of an answer."""
        problem = self.problem
        if answer.sign is not None:  # no influence: neither curvature nor removal are meant
            return dict(answer.diagnostics)
        gradient = problem.objective_gradient().norm().item()
        typical = problem.typical_gradient
        found: dict[str, Any] = {
            "weight_decay": _summed_up(problem.decay),
            **self._damping(answer),
            "regularisation_units": "of the mean loss: mean loss + weight_decay / 2 x |parameters|^2; damping is added "
            "to the eigenvalues of its second derivative",
            **answer.diagnostics,
            "gradient_norm": gradient,
            "typical_gradient_norm": typical,
            "stationary": gradient <= STATIONARY * typical,
        }
        if check and isinstance(problem, HeadProblem):
            found["spot_check"] = spot_check(problem, answer.scores, check, problem.seed)
        found["warnings"] = list(_warnings(found))
        return found

    def _damping(self, answer: Answer) -> dict[str, Any]:
        """Of methods with curvature."""
        if "eigenvalues" not in answer.diagnostics or "damping" in answer.diagnostics:
            return {}
        problem = self.problem
        return {"damping": problem.damping, "damping_chosen": problem.given_damping is None and problem.damping > 0}


def head_study(
    handle: Handle,
    trained: Sequence[str],
    train: DataSet,
    test: DataSet,
    asked: Asked,
    report: Report,
    *,
    kept: Mapping[str, Any] | None = None,
    **reading: Any,
) -> Study:
    """The head alone, with what it read of both data sets in one pass each.

    trained: parameters that are not frozen. kept: how a scan keeps what it sees of the training set, if at all.
    """
    shape = shape_of(handle, test)
    head = linear_head(handle, shape)
    if f"{head.name}.weight" not in trained:
        raise BadInput(
            f"the parameters of the head {head.name!r} are frozen (requires_grad=False), so no training image has any "
            "influence through them; name layers that were trained"
        )
    names = [f"{head.name}.weight"] + ([f"{head.name}.bias"] if head.biased else [])
    asked.check(names)
    tests = read_rows(handle, test, head, **reading)
    _check_head(handle, head, test, tests)
    outputs = len(head.weights)
    found = labels_of(test, tests.scanned, tests.indices, "test", asked.test_labels, handle.classes)
    logits = head.logits(tests.features)
    questions, test_labels = questions_of(asked, found, logits, test, tests.indices, handle)
    questions.require_outputs(head.name)
    rows = read_rows(handle, train, head, progress=report, **(kept or {}), **reading)
    labels = train_labels(asked, train, rows.scanned, rows.indices, outputs, handle)
    problem = HeadProblem(
        elsewhere=lambda other: head_study(other, trained, train, test, asked, report, **reading).problem,
        decay=head.spread(asked.decay_of).flatten(),
        given_damping=asked.damping,
        seed=asked.seed,
        report=lambda done, total: None,
        room=math.inf,
        handle=handle,
        head=head,
        train=rows.features,
        labels=labels.to(rows.features.device),
        loss=asked.loss,
        tests=tests.features,
        asked=questions,
    )
    return Study(
        problem,
        (head.name,),
        rows.indices,
        tests.indices,
        labels,
        test_labels,
        logits.cpu(),
        {
            data.name(one): why
            for data, part in ((train, rows), (test, tests))
            for one, why in part.scanned.skipped.items()
        },
        about_of(questions, found is None, handle),
    )


def network_study(
    handle: Handle,
    names: Sequence[str],
    train: DataSet,
    test: DataSet,
    asked: Asked,
    report: Report,
    *,
    room: float,
    curvature: Curvature = "gauss_newton",
    lasting: Lasting | None = None,
    **reading: Any,
) -> Study:
    """Any parameters of the model, by name; the training set is gone through as often as the method wants.

    room: bytes that images and gradients may take. reading: how the data sets are, as `TrainingImages` takes it.
    """
    asked.check(names)
    gradients = SampleGradients(handle, names)
    _require_room(handle, gradients.size, train, test, room)
    options = {"room": room, "curvature": curvature, **reading}
    tests = TrainingImages(handle, test, keep=float("inf"), **reading)
    logits = torch.cat([logits_of(handle, block.inputs) for block in tests.blocks(SOME)])
    first = next(iter(tests.blocks(SOME))).inputs
    gradients.verify(first, lambda found: found.softmax(1)[:, None])
    found = labels_of(test, tests.scanned, tests.indices, "test", asked.test_labels, handle.classes)
    questions, test_labels = questions_of(asked, found, logits, test, tests.indices, handle)
    images = TrainingImages(handle, train, keep=room / 2, **reading)
    labels = train_labels(asked, train, images.scanned, images.indices, logits.shape[1], handle)
    problem = NetworkProblem(
        elsewhere=lambda other: network_study(other, names, train, test, asked, report, **options).problem,
        decay=gradients.spread(asked.decay_of),
        given_damping=asked.damping,
        seed=asked.seed,
        report=report,
        handle=handle,
        model_gradients=gradients,
        images=images,
        labels=labels,
        loss=asked.loss,
        tests=tests,
        asked=questions,
        curvature=curvature,
        room=room,
    )
    problem.decay = problem.decay.to(problem.precise)
    problem.lasting = (
        None if lasting is None else replace(lasting.of(labels, test_labels, images.indices), report=report)
    )
    modules = tuple(dict.fromkeys(piece.module or "(the model itself)" for piece in gradients.pieces))
    return Study(
        problem,
        modules,
        images.indices,
        tests.indices,
        labels,
        test_labels,
        logits.cpu(),
        {data.name(n): why for data, one in ((train, images), (test, tests)) for n, why in one.scanned.skipped.items()},
        about_of(questions, found is None, handle),
    )


def _require_room(handle: Handle, size: int, train: DataSet, test: DataSet, room: float) -> None:
    """Raises `BadInput`, before any image is read, where questions, solutions and scores do not fit in memory."""
    if train.length is None or test.length is None:
        return
    item = 8 if size <= LARGEST_EXPLICIT else torch.finfo(handle.dtype).bits // 8
    require(
        needed(size, train.length, test.length, item, room),
        f"the influence of {train.length:,} images on {test.length:,} tests through {size:,} parameters",
        handle.device,
        "ask about fewer test images at a time or fewer layers, or give less memory=",
    )


def needed(size: int, train: int, test: int, item: int, room: float) -> float:
    """Bytes: the questions of the tests and their solutions, as much again while these are made, scores, and the room.

    item: bytes of a number.
    """
    return 4 * item * size * test + 2 * item * train * test + room


def logits_of(handle: Handle, inputs: Tensor) -> Tensor:
    """`[N, K]` of a model that is borrowed."""
    with handle.watch(shape=(inputs.shape[1], inputs.shape[2], inputs.shape[3])) as watch:
        return handle.logits(watch(inputs))


def train_labels(asked: Asked, data: DataSet, scanned: Any, indices: Tensor, outputs: int, handle: Handle) -> Tensor:
    """The labels of the training images, checked against the model's outputs. Raises `BadInput` without any."""
    labels = labels_of(data, scanned, indices, "training", asked.labels, handle.classes)
    if labels is None:
        raise BadInput(
            "the training set has no labels, and influence is about the loss for them: a folder with a subfolder for "
            "each class, items (image, label), or labels="
        )
    return fitting(labels, indices, data, outputs, asked.loss, "training")


def fitting(labels: Tensor, indices: Tensor, data: DataSet, outputs: int, loss: Loss, what: str) -> Tensor:
    """Labels as the loss takes them: classes, or any numbers where there is one output or the loss is the user's."""
    if loss.kind == "given" or (loss.kind == "squared" and outputs == 1):
        return labels
    return require_classes(labels, indices, data, outputs, what)


def questions_of(
    asked: Asked, labels: Tensor | None, logits: Tensor, data: DataSet, indices: Tensor, handle: Handle
) -> tuple[Questions, Tensor]:
    """What is asked of each test image, and its labels, -1 where there are none.

    Without labels it is the loss for the class that the model predicts.
    """
    if asked.targets is not None and len(asked.targets) not in (1, len(indices)):
        raise BadInput(f"{len(asked.targets)} targets for {len(indices)} test images; give one for all or one for each")
    targets = None if asked.targets is None else list(asked.targets) * (len(indices) if len(asked.targets) == 1 else 1)
    if labels is None:
        known, labels = torch.full((len(indices),), -1), logits.argmax(1).cpu()
        return Questions(asked.loss, labels, targets, handle.classes), known
    labels = fitting(labels, indices, data, logits.shape[1], asked.loss, "test")
    return Questions(asked.loss, labels, targets, handle.classes), labels


def about_of(questions: Questions, predicted: bool, handle: Handle) -> tuple[str, ...]:
    """What is asked of each test image, in words."""
    if questions.targets is not None:
        return tuple(map(str, questions.targets))
    known = questions.loss.kind != "given" and not questions.labels.is_floating_point()
    names = [handle.name_of(int(label)) if known else f"{label:g}" for label in questions.labels.tolist()]
    return tuple(f"loss for {name}" + (", as predicted" if predicted else "") for name in names)


def shape_of(handle: Handle, data: DataSet) -> Shape:
    """(C, H, W) of the model's inputs, or of the first image if the model's are not known."""
    if handle.spec.input_size is not None:
        return handle.spec.input_size
    first = next((sample for sample in data.samples() if sample.inputs is not None), None)
    if first is None or first.inputs is None:
        raise BadInput("none of the test images could be read")
    channels, height, width = first.inputs.shape
    return channels, height, width


def _check_head(handle: Handle, head: Head, data: DataSet, rows: Rows) -> None:
    """The head held against the model on the first test image."""
    sample = data.read(int(rows.indices[0]))
    if sample.inputs is not None:
        inputs = sample.inputs[None].to(handle.device, handle.dtype)
        require_linear(handle, head, inputs, rows.features[:1])


def _summed_up(decay: Tensor) -> float | list[float]:
    values = sorted(set(decay.tolist()))
    return values[0] if len(values) == 1 else values


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """What a user has to know before trusting the scores."""
    said = []
    if not found.get("converged", True):
        said.append(
            f"the solver stopped at a residual of {found['residual']:.2g} after {found['iterations']} iterations; give "
            "it more, or more damping"
        )
    if not found["stationary"]:
        share = found["gradient_norm"] / max(found["typical_gradient_norm"], 1e-300)
        said.append(
            f"the model is at no minimum of this loss over this training set: the mean gradient is {share:.0%} of a "
            "single image's. Scores then tell what removing an image does beside the training that is still to come"
        )
    if found.get("damping_chosen"):
        said.append(
            f"no weight decay is known, so a damping of {found['damping']:.2g} was chosen, ten times the mean "
            "eigenvalue; give the weight_decay of the training if there was one"
        )
    checked = found.get("spot_check")
    if checked and checked["spearman"] < 0.9:
        said.append(
            f"of {len(checked['removed'])} training images really removed, the ranks agree to "
            f"{checked['spearman']:.2f} only"
        )
    return said
