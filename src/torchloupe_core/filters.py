"""The weights of a layer as pictures: what `weights` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from torchloupe_core.errors import BadInput
from torchloupe_core.results import Result

__all__ = ["Filters", "Scale"]

Scale = Literal["shared", "each"]


@dataclass(frozen=True, eq=False)
class Filters(Result):
    """The filters of a layer.

    images: `[F, C, kh, kw]` float32, raw, signed; rows of a linear layer are `[F, C]`. inputs: `[F, C]`, which input
    channel each is the weight on. If colour, the inputs are red, green and blue; rows come in the model's order; all
    else is sorted by norm within each filter, largest first, and `in_order()` undoes it.
    layer: the module that holds the weights. channels: the output channel of each filter; names: its class, where the
    layer is the classifier. to: the earlier layer whose channels the inputs are, for weights expanded over several
    layers, None for the layer's own. scale: what `plot` and `normalize` divide by, the largest weight of all filters
    ("shared") or of each filter by itself ("each"). diagnostics: the kind of the layer; of expanded weights the
    position read, its box in the map of `to`, whether the map's border cuts it off, the nonlinearities ignored.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_looking"

    images: Tensor
    inputs: Tensor
    layer: str
    channels: tuple[int, ...]
    colour: bool
    scale: Scale = "shared"
    to: str | None = None
    names: tuple[str, ...] = ()
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def in_order(self) -> Tensor:
        """The images with the input channels in the model's own order."""
        order = self.inputs.argsort(dim=1)
        return self.images.take_along_dim(order.view(*order.shape, *(1,) * (self.images.ndim - 2)), 1)

    def normalize(self, how: Literal["absmax", "minmax", "none"] = "absmax", *, scale: Scale | None = None) -> Tensor:
        """The images, all or each filter by itself: "absmax" to [-1, 1] with zero kept, "minmax" to [0, 1]."""
        if how == "none":
            return self.images
        flat = self._grouped(self.scale if scale is None else scale)
        if how == "absmax":
            largest = flat.abs().amax(1)
            return self.images / self._spread(largest.where(largest > 0, 1.0))
        if how == "minmax":
            low, high = flat.amin(1), flat.amax(1)
            return (self.images - self._spread(low)) / self._spread((high - low).where(high > low, 1.0))
        raise BadInput(f'normalize takes "absmax", "minmax" or "none"; got {how!r}')

    def _grouped(self, scale: str) -> Tensor:
        """`[1, all]` or `[F, each]`."""
        if scale not in ("shared", "each"):
            raise BadInput(f'scale is "shared" or "each"; got {scale!r}')
        return self.images.reshape(1, -1) if scale == "shared" else self.images.flatten(1)

    def _spread(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * (self.images.ndim - 1))
