"""Small changes that make a model see something else: what `fool` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchloupe_core.results import Result

__all__ = ["Fooled"]


@dataclass(frozen=True, eq=False)
class Fooled(Result):
    """Images changed a little, and what the model sees in them before and after.

    images: `[N, C, H, W]` in [0, 1], the changed ones, as they go into a file of 8 bits; given: the same before the
    change. before, after: the model's probabilities for them, `[N, K]`, each of a forward pass of its own. goals: what
    was maximised, as `prob:fish` or `-prob:tree`. aims: the class each was to be seen as, `[N]`, -1 for any other than
    the one seen. success: whether the fresh forward pass sees that, `[N]` bool. norm, eps: how far an image may go.
    losses: `[N, steps]`, the goal's negative at each step. stopped: why the run ended early, "" if it did not.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_fooled"

    images: Tensor
    given: Tensor
    before: Tensor
    after: Tensor
    goals: tuple[str, ...]
    aims: Tensor
    success: Tensor
    norm: str
    eps: float
    losses: Tensor
    classes: tuple[str, ...] | None = None
    stopped: str = ""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Fooled:
        """What became of one image."""
        index = range(len(self))[index]
        one = slice(index, index + 1)
        names = ("images", "given", "before", "after", "goals", "aims", "success", "losses")
        cut: dict[str, Any] = {name: getattr(self, name)[one] for name in names}
        facts = {name: value[one] if isinstance(value, list) else value for name, value in self.diagnostics.items()}
        return replace(self, **cut, diagnostics=facts)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def rate(self) -> float:
        """The share of images that were changed with success."""
        return self.success.float().mean().item()

    @property
    def difference(self) -> Tensor:
        """`[N, C, H, W]`: what was added to each pixel."""
        return self.images - self.given

    @property
    def distances(self) -> Tensor:
        """`[N, 2]`: the largest change of a pixel's channel, and the L2 norm of all changes."""
        flat = self.difference.double().flatten(1)
        return torch.stack([flat.abs().amax(1), flat.norm(dim=1)], 1)

    def seen(self, index: int) -> tuple[str, str]:
        """What the model sees in an image before and after, by name."""
        return self.name(int(self.before[index].argmax())), self.name(int(self.after[index].argmax()))

    def name(self, label: int) -> str:
        """Of a class, or its number."""
        return self.classes[label] if self.classes is not None and label < len(self.classes) else str(label)
