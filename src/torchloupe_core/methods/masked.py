"""An image under many masks: the target's value for each, and the model's whole output where it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from torchloupe_core.baselines import filling
from torchloupe_core.errors import NotApplicable
from torchloupe_core.query import Query, finite
from torchloupe_core.recorded import Outputs

__all__ = ["Masked", "Masks", "values_under"]


class Masks(Protocol):
    """n masks `[n, H, W]`, made when sliced; 1 keeps a pixel, 0 gives it to the baseline."""

    def __len__(self) -> int: ...
    def __getitem__(self, chosen: slice) -> Tensor: ...


class Masked:
    """The images of a query under the same masks, what they hide replaced by a baseline.

    classes: whether to keep the model's output for each image and its variants, `outputs [N, 1 + n, K]` on the CPU,
    and each image's own score, `own`. Else nothing grows with the number of masks but the scores of one image.
    """

    def __init__(self, query: Query, masks: Masks, baseline: Tensor | float | str, *, classes: bool) -> None:
        inner = [name for bound in query.targets for name in bound.target.layers]
        if classes and inner:
            raise NotApplicable(
                f"classes=True keeps the model's outputs, but the target reads layer {inner[0]!r}; leave it out, or "
                "ask about logit:, prob: or margin: of a class"
            )
        self.query, self.masks, self.classes = query, masks, classes
        self.own: list[Tensor] = []
        self.outputs: Tensor | None = None
        self._fillings = filling(query, baseline).expand_as(query.inputs)

    def scores(self, index: int) -> Iterator[Tensor]:
        """One image's scores as far as they are known, after each batch: `[b]`, `[2 b]`, up to `[n]`."""
        part, n = self.query.only(index, index + 1), len(self.masks)
        if self.classes:
            self.own.append(self._asked(part, part.inputs, index, 0))
        exact = torch.promote_types(part.inputs.dtype, torch.float32)
        known = torch.empty(n, dtype=exact, device=part.inputs.device)

        def ask(start: int, stop: int) -> Tensor:
            masks = self.masks[start:stop].to(part.inputs)[:, None]  # [m, 1, H, W]
            return self._asked(part, torch.lerp(self._fillings[index], part.inputs, masks), index, 1 + start)

        for start, stop, scores in self.query.pace.run(n, ask):
            known[start:stop] = scores
            self.query.progress(index * n + stop, len(self._fillings) * n)
            yield known[:stop]

    def _asked(self, part: Query, inputs: Tensor, index: int, row: int) -> Tensor:
        """The target's value for variants of one image, `[m]`; their outputs are kept from a row on."""
        if not self.classes:
            return part.score(inputs, [0] * len(inputs))
        outputs = part.outputs(inputs)
        if self.outputs is None:
            self.outputs = torch.empty(len(self._fillings), 1 + len(self.masks), outputs.shape[1])
        self.outputs[index, row : row + len(outputs)] = outputs
        return finite(part.targets[0].read(Outputs(outputs)))


def values_under(part: Query, begin: Tensor, masks: Tensor) -> Tensor:
    """One image's target `[n]` under masks `[n, H, W]`; what they hide comes from `begin [C, H, W]`."""

    def ask(start: int, stop: int) -> Tensor:
        shown = masks[start:stop].to(part.inputs)[:, None]  # [m, 1, H, W]
        return part.score(torch.lerp(begin, part.inputs, shown), [0] * (stop - start))

    return torch.cat([values for _, _, values in part.pace.run(len(masks), ask)])
