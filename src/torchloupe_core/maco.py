"""MaCo: images whose frequencies are as strong as those of pictures, so that only their phases are optimised.

Fel et al. 2023, Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained Optimization. What no
gradient ever asked for is told by `alpha`, gathered over the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.canvas import FURTHEST, Canvas, Draw
from torchloupe_core.colour import Colours, as_colours, separated
from torchloupe_core.errors import BadInput
from torchloupe_core.parametrizations import Parametrization, Shape, Size, frequencies

__all__ = ["MaCo", "magnitudes"]


@dataclass(frozen=True)
class MaCo(Parametrization):
    """Phases, at random to begin with; the magnitude of every frequency is fixed.

    magnitude: `[C, H, W // 2 + 1]`, as `magnitudes` measures it on images of a data set; without it 1 / frequency, as
    in natural images. Of another size it is interpolated. contrast: the standard deviation of colours before the
    sigmoid. The images' mean is grey. The paper makes images several times larger than the model's input and shows it
    crops, transforms="maco"; at the model's own size other transforms do better.
    """

    lr: ClassVar[float] = 0.1
    transparent: ClassVar[bool] = True

    magnitude: Tensor | None = field(default=None, repr=False, compare=False)
    contrast: float = 1.0
    colours: Colours = "imagenet"

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        channels, height, width = shape
        magnitude = self._fixed(channels, (height, width)).to(device, dtype)
        start = ((draw.uniform(*magnitude.shape) * 2 - 1) * math.pi).to(device, dtype)

        def decode() -> Tensor:
            spectrum = torch.polar(magnitude.expand(len(start), -1, -1, -1), _odd(canvas.tensors[0], width))
            values: Tensor = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")
            return values

        def encode(values: Tensor) -> list[Tensor]:
            phase = torch.fft.rfft2(values, norm="ortho").angle()
            return [_halved(phase, width)]

        canvas = Canvas([start], decode, encode, as_colours(self.colours, channels))
        return canvas

    def _fixed(self, channels: int, size: Size) -> Tensor:
        """The magnitudes for images of this size, whose numbers then have the contrast asked for."""
        if self.magnitude is None:
            frequency = frequencies(*size)[:, : size[1] // 2 + 1]
            found = (1 / frequency.clamp(min=1 / max(size))).expand(channels, -1, -1).clone()
        else:
            found = _sized(self.magnitude.detach().double().cpu(), channels, size)
        found[:, 0, 0] = 0.0  # the mean
        twice = torch.full((size[1] // 2 + 1,), 2.0, dtype=found.dtype)  # conjugates are not written down
        twice[0] = 1.0
        if size[1] % 2 == 0:
            twice[-1] = 1.0
        power = (found.square() * twice).sum((1, 2)) / (size[0] * size[1])  # of each channel, by Parseval
        colours = as_colours(self.colours, channels)
        mixed = power if colours is None else colours.double().square() @ power
        return found * self.contrast / mixed.mean().sqrt().clamp(min=1e-12)


def magnitudes(images: Tensor, colours: Colours = "imagenet") -> Tensor:
    """`[C, H, W // 2 + 1]`: how strong each frequency is on average in images `[N, C, H, W]` in [0, 1] or `uint8`.

    Of the numbers that stand for the images, before colours are mixed and a sigmoid is taken.
    """
    if images.ndim != 4 or len(images) == 0:
        raise BadInput(f"magnitudes are measured on images [N, C, H, W]; got {list(images.shape)}")
    pixels = images.detach().double() / (255.0 if images.dtype == torch.uint8 else 1.0)
    numbers = separated(torch.logit(pixels).clamp(-FURTHEST, FURTHEST), as_colours(colours, images.shape[1]))
    found: Tensor = torch.fft.rfft2(numbers - numbers.mean((2, 3), keepdim=True), norm="ortho").abs().mean(0)
    return found.float()


def _odd(phase: Tensor, width: int) -> Tensor:
    """Phases of a real image: where both a frequency and its opposite are written down, one is the other's negative.

    These are the first column and, of even widths, the last. Otherwise a part of the magnitude would be lost.
    """
    columns = [0, phase.shape[3] - 1] if width % 2 == 0 else [0]
    opposite = phase.flip(2).roll(1, 2)
    mask = torch.zeros(phase.shape[3], dtype=torch.bool, device=phase.device)
    mask[columns] = True
    return torch.where(mask, phase - opposite, phase)


def _halved(phase: Tensor, width: int) -> Tensor:
    """Numbers whose `_odd` is these phases of a real image."""
    columns = [0, phase.shape[3] - 1] if width % 2 == 0 else [0]
    found = phase.clone()
    found[..., columns] /= 2
    return found


def _sized(magnitude: Tensor, channels: int, size: Size) -> Tensor:
    if magnitude.ndim != 3 or len(magnitude) not in (1, channels) or not magnitude.isfinite().all():
        raise BadInput(f"magnitude is finite numbers [{channels}, H, W // 2 + 1]; got {list(magnitude.shape)}")
    rows = torch.fft.fftshift(magnitude, dim=1)[None]
    resized = F.interpolate(rows, size=(size[0], size[1] // 2 + 1), mode="bilinear", align_corners=True)[0]
    found: Tensor = torch.fft.ifftshift(resized, dim=1)
    return found.expand(channels, -1, -1).clone()
