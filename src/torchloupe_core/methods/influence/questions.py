"""What is asked of each test image, as a number to be explained by training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchloupe_core.errors import NotApplicable
from torchloupe_core.losses import Loss
from torchloupe_core.recorded import Outputs
from torchloupe_core.targets import Target

__all__ = ["Questions"]


@dataclass(frozen=True)
class Questions:
    """The loss of T test images for their labels `[T]`, or minus their targets: less of it is more support.

    So that one sign serves both, a training image supports a prediction if removing it raises this number.
    """

    loss: Loss
    labels: Tensor
    targets: Sequence[Target] | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, logits: Tensor, which: Tensor) -> Tensor:
        """`[m]`: the question of test image `which[m]`, at logits `[m, K]` that it may have."""
        if self.targets is None:
            return self.loss(logits, self.labels.to(logits.device)[which])
        outputs, values = Outputs(logits, self.classes), logits.new_zeros(len(logits))
        asked: dict[Target, list[int]] = {}
        for row, test in enumerate(which.tolist()):
            asked.setdefault(self.targets[test], []).append(row)
        for target, rows in asked.items():
            values = values.index_put((torch.tensor(rows, device=logits.device),), -outputs.score(target)[rows])
        return values

    def slopes(self, logits: Tensor, which: Tensor | None = None) -> Tensor:
        """`[m, K]`: its derivative at the logits `[m, K]` of some of the test images, of all unless said."""
        logits = logits.detach().requires_grad_(True)
        with torch.enable_grad():
            values = self.of(logits, torch.arange(len(logits)) if which is None else which)
            (slopes,) = torch.autograd.grad(values.sum(), logits)
        return slopes

    @property
    def inner(self) -> tuple[str, ...]:
        """The layers that targets read inside the model."""
        return tuple(dict.fromkeys(name for target in self.targets or () for name in target.layers))

    def require_outputs(self, name: str) -> None:
        """Raises `NotApplicable` for a target that the head's parameters have no part in."""
        if self.inner:
            raise NotApplicable(
                f"the target reads layer {self.inner[0]!r}, which the parameters of {name!r} have no part in; ask "
                "about the whole network with layers='all', or name layers before it"
            )
