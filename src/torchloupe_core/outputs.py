"""The model's outputs, kept: any target that reads nothing else is answered from them, without a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from torchloupe_core.errors import NotApplicable
from torchloupe_core.targets import Target

__all__ = ["Outputs"]


@dataclass(frozen=True)
class Outputs:
    """The output for each of n inputs, `[n, K]`, and the classes' names: what a target is bound to and read from."""

    values: Tensor
    classes: tuple[str, ...] | None = None

    def score(self, target: Target) -> Tensor:
        """The target's value for each input, `[n]`. Raises `NotApplicable` for one that reads a layer."""
        return target.bind(self).read(self)

    @property
    def outputs(self) -> int:
        """How many outputs the model has."""
        return self.values.shape[1]

    def logits(self) -> Tensor:
        """The outputs as they are."""
        return self.values

    def layer(self, name: str) -> NoReturn:
        """Of layers nothing was kept."""
        raise NotApplicable(
            f"layer {name!r} was not kept, only the model's outputs; ask about logit:, prob: or margin: of a class, "
            "or explain the layer anew with target="
        )

    map = layer
