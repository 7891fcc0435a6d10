"""The model's outputs, kept: any target that reads nothing else is answered from them, without a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from torchloupe_core.errors import NotApplicable
from torchloupe_core.targets import Target

__all__ = ["Outputs"]


_KEPT = "ask about logit:, prob:, sigmoid: or margin: of a class, or explain anew with target="


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

    @property
    def image(self) -> NoReturn:
        """Where in an image a region lies was not kept."""
        raise NotApplicable(f"only logits were kept; {_KEPT}")

    def layer(self, name: str) -> NoReturn:
        """Of layers nothing was kept."""
        raise NotApplicable(f"layer {name!r} was not kept, only the model's outputs; {_KEPT}")

    def embed(self, image: object, layer: str | None) -> NoReturn:
        """No other image is shown to the model."""
        raise NotApplicable(f"an embedding needs the model, of which only outputs were kept; {_KEPT}")

    def class_maps(self) -> NoReturn:
        """The outputs are logits."""
        raise NotApplicable(f"only logits were kept, no class maps; {_KEPT}")

    def detections(self) -> NoReturn:
        """The outputs are logits."""
        raise NotApplicable(f"only logits were kept, no detections; {_KEPT}")

    def embedding(self, layer: str | None) -> NoReturn:
        """The outputs are logits."""
        raise NotApplicable(f"only logits were kept, no embedding; {_KEPT}")

    map = layer
