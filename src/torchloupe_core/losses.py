"""Losses as functions of the model's output, one number for each image, with their first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, hessian, vmap
from torch.nn import functional as F

from torchloupe_core.errors import BadInput, NotApplicable, UnknownName

__all__ = ["LOSSES", "Loss", "LossLike", "as_loss"]

PerImage = Callable[[Tensor, Tensor], Tensor]
LossLike = str | PerImage | None


@dataclass(frozen=True)
class Loss:
    """A loss `of(logits [N, K], labels [N]) -> [N]`.

    kind: "cross_entropy" and "squared" have derivatives in closed form, any other is differentiated image by image in
    one vectorised call. Logits enter with whatever dimensions before K; labels with the same.
    """

    kind: Literal["cross_entropy", "squared", "given"]
    name: str
    of: PerImage

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image, `[N]`. Raises `BadInput` if a user's own gives anything else."""
        values = self.of(logits, labels)
        if values.shape != logits.shape[:1]:
            raise BadInput(
                f"loss {self.name} gives shape {list(values.shape)} for {len(logits)} images; influence needs one "
                "number for each image, [N], as of reduction='none'"
            )
        return values

    def gradient(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`[N, K]`, with respect to the logits."""
        if self.kind == "cross_entropy":
            return logits.softmax(1) - F.one_hot(labels, logits.shape[1]).to(logits)
        if self.kind == "squared":
            return logits - _wanted(logits, labels)
        gradient: Tensor = vmap(grad(self._of_one))(logits, labels)
        return gradient

    def curvature(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`[N, K, K]`, the second derivative with respect to the logits."""
        if self.kind == "cross_entropy":
            p = logits.softmax(1)
            return torch.diag_embed(p) - p[:, :, None] * p[:, None]
        if self.kind == "squared":
            return torch.eye(logits.shape[1]).to(logits).expand(len(logits), -1, -1)
        curvature: Tensor = vmap(hessian(self._of_one))(logits, labels)
        return curvature.detach()

    def curved(self, logits: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
        """`[..., N, K]`: the second derivative times directions `[..., N, K]`."""
        if self.kind == "cross_entropy":
            weighted = logits.softmax(1) * directions
            return weighted - logits.softmax(1) * weighted.sum(-1, keepdim=True)
        if self.kind == "squared":
            return directions
        return torch.einsum("nkl,...nl->...nk", self.curvature(logits, labels), directions)

    def root(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`[N, K, K]`: a matrix R with the second derivative RR'. Raises `NotApplicable` where that has none."""
        if self.kind == "cross_entropy":
            p = logits.softmax(1)
            return torch.diag_embed(p.sqrt()) - p[:, :, None] * p[:, None].sqrt()
        curvature = self.curvature(logits, labels)
        if self.kind == "squared":
            return curvature
        values, vectors = torch.linalg.eigh(curvature)
        if bool((values < -1e-6 * values.abs().amax(1, keepdim=True).clamp(min=1e-12)).any()):
            raise NotApplicable(
                f"loss {self.name} is not convex in the logits, so it has no Gauss-Newton matrix; take "
                "curvature='hessian'"
            )
        root: Tensor = vectors * values.clamp(min=0).sqrt()[:, None]
        return root

    @property
    def convex(self) -> bool:
        """Whether it is known to be convex in the logits."""
        return self.kind != "given"

    def _of_one(self, logits: Tensor, label: Tensor) -> Tensor:
        return self(logits[None], label[None])[0]


def as_loss(loss: LossLike) -> Loss:
    """The loss of that name, or a user's own function of (logits, labels); cross-entropy if None."""
    if loss is None:
        return LOSSES["cross_entropy"]
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise UnknownName.of("loss", loss, LOSSES)
        return LOSSES[loss]
    if not callable(loss):
        raise BadInput(f"a loss is one of {', '.join(LOSSES)}, or a function (logits, labels) -> [N]; got {loss!r}")
    return Loss("given", getattr(loss, "__name__", type(loss).__name__), loss)


def _wanted(logits: Tensor, labels: Tensor) -> Tensor:
    """What the squared loss pulls the output to: the label itself where there is one output, else its unit vector."""
    if logits.shape[1] == 1:
        return labels[:, None].to(logits)
    return F.one_hot(labels, logits.shape[1]).to(logits)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - _wanted(logits, labels)).square().sum(1) / 2


LOSSES = {
    "cross_entropy": Loss("cross_entropy", "cross_entropy", _cross_entropy),
    "squared": Loss("squared", "squared", _squared),
}
