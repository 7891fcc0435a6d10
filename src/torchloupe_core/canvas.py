"""Numbers an optimiser moves, and the images they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchloupe_core.colour import mixed, separated
from torchloupe_core.errors import NotApplicable

__all__ = ["Canvas", "Draw"]

SEEDS = 2**63
FURTHEST = 4.6  # a pixel of 0 or 1 would take an infinite number; this is the number of 0.99


class Draw:
    """Standard normal numbers for images `start` to `stop`, each image's from a source of its own.

    So an image does not depend on how many others are made, nor on how many at once. `draw(3, 8)` is `[n, 3, 8]`.
    """

    def __init__(self, seed: int, start: int, stop: int) -> None:
        self._sources = [torch.Generator().manual_seed((seed + index) % SEEDS) for index in range(start, stop)]
        self._common = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._sources)

    def __call__(self, *size: int) -> Tensor:
        return torch.stack([torch.randn(size, generator=source) for source in self._sources])

    def uniform(self, *size: int) -> Tensor:
        """Numbers from 0 to 1, `[n, *size]`."""
        return torch.stack([torch.rand(size, generator=source) for source in self._sources])

    def common(self, *size: int) -> Tensor:
        """Standard normal numbers `[*size]` that all images share."""
        return torch.randn(size, generator=self._common)


class Canvas:
    """Leaf tensors to optimise and the images `[n, C, H, W]` in [0, 1] that they stand for.

    decode: independent numbers `[n, C, H, W]` of any size, made from the tensors; colours mixes them and a sigmoid
    makes them pixels. encode: the tensors that decode to given numbers, where there are any.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        decode: Callable[[], Tensor],
        encode: Callable[[Tensor], Sequence[Tensor]] | None = None,
        colours: Tensor | None = None,
    ) -> None:
        self.tensors = [tensor.requires_grad_(True) for tensor in tensors]
        self.decode, self.encode, self.colours = decode, encode, colours

    def images(self) -> Tensor:
        """The images now, differentiable with respect to the tensors."""
        return torch.sigmoid(mixed(self.decode(), self.colours))

    def paint(self, images: Tensor) -> None:
        """Sets the tensors so that the images are these, or as near as they can come. Raises `NotApplicable`."""
        with torch.no_grad():
            numbers = torch.logit(images.detach().double()).clamp(-FURTHEST, FURTHEST)
            for tensor, found in zip(self.tensors, self.encoded(separated(numbers, self.colours)), strict=True):
                tensor.copy_(found)

    def encoded(self, values: Tensor) -> Sequence[Tensor]:
        """The tensors that decode to these numbers."""
        if self.encode is None:
            raise NotApplicable(
                "this parametrization cannot take up a given image; use 'fourier', 'pixel', 'pyramid' or 'lowres'"
            )
        return self.encode(values)

    def penalty(self) -> Tensor | None:
        """What the numbers themselves add to the loss of each image, `[n]`."""
        return None

    def settle(self) -> None:
        """After every step: numbers that are out of bounds come back."""

    def kept(self) -> list[Tensor]:
        """Copies of the tensors, to go back to."""
        return [tensor.detach().clone() for tensor in self.tensors]

    def go_back(self, kept: Sequence[Tensor]) -> None:
        """Sets the tensors to what they were."""
        with torch.no_grad():
            for tensor, before in zip(self.tensors, kept, strict=True):
                tensor.copy_(before)
