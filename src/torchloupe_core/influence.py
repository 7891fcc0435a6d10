"""The training images a prediction rests on: what `influence` returns."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.results import Attribution, Result
from torchloupe_core.thumbnails import small

__all__ = ["Influence", "Kind", "Ranking"]

Kind = Literal["helpful", "harmful"]

THUMBNAIL = 96  # pixels
RELATIVE = "over the norm of its gradient"
KEPT, KEPT_TESTS = 6, 24  # pictures of each kind for each test image, and tests, in a saved result


class Question(Protocol):
    """What was asked, kept as long as the model is there."""

    def only(self, row: int) -> Question:
        """That of one test image."""

    def pixels(self, row: int, train: int, label: Tensor) -> tuple[Tensor, Tensor]:
        """`[1, C, H, W]`: the score's gradient by a training image's pixels, and the image as it is shown."""


class Ranking(NamedTuple):
    """For each test image k training images, first those that matter most.

    indices: `[T, k]`, in the training set. scores: `[T, k]`. labels: `[T, k]`, as the training set gives them.
    """

    indices: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Influence(Result):
    """How much each of N_train training images supports what is asked about each of N_test test images.

    scores: `[N_test, N_train]`; positive: the image supported the prediction, removing it raises the test's loss, or
    lowers the target asked about. sign: that in words; units: what a score of 1 means. about: what was asked of each
    test image. The method "self" has one row, each training image's influence on itself.

    train_indices, test_indices: of columns and rows in their data sets; an image that could not be read has none.
    train_labels, test_labels: as given, -1 where unknown. predictions: the class each test image is taken for,
    `[N_test]`, and its probability, confidences. layers: the layers whose parameters take part, parameters: how many
    numbers those are. Influence through other parameters is left out: by default only the head is asked about.

    gradient_norms: `[N_train]`, how strongly each training image still pulls at the parameters.

    diagnostics: weight decay and damping in use, both for the mean loss; the solver's residual and iterations; extreme
    eigenvalues; how near the model is to a minimum; a check against removing images in fact; `warnings`, in words.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_influence"

    scores: Tensor
    sign: str
    units: str
    about: tuple[str, ...]
    train_indices: Tensor
    test_indices: Tensor
    train_labels: Tensor
    test_labels: Tensor
    predictions: Tensor
    confidences: Tensor
    layers: tuple[str, ...]
    parameters: int
    gradient_norms: Tensor
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    thumbnails: Tensor | None = None  # [M, 3, 96, 96] bytes, in a result that was saved
    thumbnail_of: tuple[str, ...] = ()
    train: DataSet | None = None
    test: DataSet | None = None
    question: Question | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int) -> Influence:
        """The influence on one test image."""
        row = range(len(self))[index]
        per_test = ("scores", "test_indices", "test_labels", "predictions", "confidences")
        changes: dict[str, Any] = {name: getattr(self, name)[row : row + 1] for name in per_test}
        question = None if self.question is None else self.question.only(row)
        return replace(self, about=self.about[row : row + 1], question=question, **changes)

    def top(self, k: int = 5, kind: Kind = "helpful") -> Ranking:
        """The k training images of largest score for each test image, or with "harmful" of the smallest.

        Of equal scores the first in the training set comes first. Raises `BadInput` for another kind.
        """
        if kind not in ("helpful", "harmful"):
            raise BadInput(f'kind is "helpful" or "harmful"; got {kind!r}')
        if k < 1:
            raise BadInput(f"k is at least 1; got {k}")
        columns = self.scores.argsort(dim=1, descending=kind == "helpful", stable=True)[:, :k]
        return Ranking(self.train_indices[columns], self.scores.gather(1, columns), self.train_labels[columns])

    def relative(self) -> Influence:
        """The same with each score over the norm of its training image's gradient: what it does for its size.

        Images that the model fits perfectly have hardly any gradient left, however much the model learned from them,
        and poorly fitted ones lead every list. As relative influence (Barshan et al. 2020, RelatIF: Identifying
        Explanatory Training Examples via Relative Influence), with the plain norm in place of those with curvature.
        """
        smallest = torch.finfo(self.scores.dtype).tiny
        norms = self.gradient_norms.to(self.scores.dtype)
        scores = torch.where(norms > 0, self.scores / norms.clamp(min=smallest), 0.0)
        kept = {name: value for name, value in self.diagnostics.items() if name != "spot_check"}  # of the scores as are
        units = f"{self.units}, {RELATIVE}"
        return replace(self, scores=scores, units=units, diagnostics=kept, question=None)

    def where(self, train: int, test: int = 0) -> Attribution:
        """Where in a training image its influence on a test image comes from: the score's gradient by its pixels.

        train: its index in the training set; test: the row. values sum the input's channels, which are in per_channel:
        where they are positive, more of the pixel is more support. Koh and Liang 2017, eq. 5. Raises `NotApplicable`
        where scores are not products with gradients, or the result was saved and opened again.
        """
        row = range(len(self))[test]
        if self.question is None:
            raise NotApplicable(
                f"{self.method} keeps nothing to ask about pixels: take 'cg', 'exact', 'ekfac' or 'gradient_dot', in "
                "the session that asked, and before relative()"
            )
        if train not in self.train_indices.tolist():
            raise BadInput(f"there is no training image {train}; the columns are those of .train_indices")
        column = self.train_indices.tolist().index(train)
        begun = time.perf_counter()
        gradient, image = self.question.pixels(row, train, self.train_labels[column])
        return Attribution(
            method=self.method,
            backend=self.backend,
            seed=self.seed,
            seconds=time.perf_counter() - begun,
            forwards=1,
            versions=self.versions,
            options=self.options,
            values=gradient.sum(1),
            images=image,
            scores=self.scores[row : row + 1, column],
            target=f"influence of training image {train} on test image {int(self.test_indices[row])}",
            per_channel=gradient,
        )

    def together(self, groups: Sequence[Iterable[int]]) -> Tensor:
        """`[N_test, G]`: the influence of groups of training images, by their indices: to first order the sum.

        Raises `BadInput` for an image that is not in the training set or could not be read.
        """
        place = {index: column for column, index in enumerate(self.train_indices.tolist())}
        columns = []
        for group in groups:
            members = [int(index) for index in group]
            if lacking := [index for index in members if index not in place]:
                raise BadInput(f"there is no training image {lacking[0]}; the columns are those of .train_indices")
            columns.append(self.scores[:, [place[index] for index in members]].sum(1))
        return torch.stack(columns, 1) if columns else self.scores[:, :0]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against these scores, in words."""
        return tuple(self.diagnostics.get("warnings", ()))

    def name_of(self, label: float) -> str:
        """The name of a class, or its number; a dash where unknown."""
        if label < 0:
            return "-"
        known = self.classes is not None and label == int(label) and int(label) < len(self.classes)
        return self.classes[int(label)] if known and self.classes is not None else f"{label:g}"

    def pictures(self, which: Literal["train", "test"], indices: Iterable[int]) -> dict[int, Tensor]:
        """`[3, 96, 96]` uint8 each: images of one of the data sets, made small, each read once.

        Raises `BadInput` where one cannot be read any more or was not saved with the result.
        """
        data, wanted = self.train if which == "train" else self.test, sorted(set(indices))
        if data is None:
            return {index: self._kept(f"{which} {index}") for index in wanted}
        found = {}
        for sample in data.read_each(wanted):
            if sample.inputs is None:
                raise BadInput(f"{data.name(sample.index)} was read before and cannot be now: {sample.error}")
            found[sample.index] = small(sample.inputs, data.spec, THUMBNAIL)
        return found

    def save(self, path: str | os.PathLike[str], *, pictures: bool = True) -> Path:
        """As every result, with small pictures of what a drawing shows; pictures=False leaves them out."""
        kept = self._thumbnails() if pictures and self.train is not None else {}
        stacked = torch.stack(list(kept.values())) if kept else self.thumbnails
        names = tuple(kept) or self.thumbnail_of
        bare = replace(self, train=None, test=None, question=None, thumbnails=stacked, thumbnail_of=names)
        return super(Influence, bare).save(path)

    def _thumbnails(self) -> dict[str, Tensor]:
        k = KEPT if len(self.test_indices) else KEPT * KEPT_TESTS
        kinds: tuple[Kind, ...] = ("helpful", "harmful")
        shown = [self.top(k, kind).indices[:KEPT_TESTS].flatten().tolist() for kind in kinds]
        train = self.pictures("train", [index for indices in shown for index in indices])
        test = self.pictures("test", self.test_indices[:KEPT_TESTS].tolist())
        return {f"{which} {n}": one for which, found in (("train", train), ("test", test)) for n, one in found.items()}

    def _kept(self, name: str) -> Tensor:
        if self.thumbnails is None or name not in self.thumbnail_of:
            raise BadInput(f"this result was saved without a picture of {name.replace(' ', ' image ')}")
        return self.thumbnails[self.thumbnail_of.index(name)]
