"""What an optimised image is made of: pixels, frequencies, coarse and fine images added up, a small network.

The same objective finds different images in different parametrisations, since steps of equal size differ (Olah 2017;
Mordvintsev et al. 2018, Differentiable Image Parameterizations). Formulas and constants are those of Lucid.

    visualize(model, "layer3:11", parametrization="pixel")
    visualize(model, "layer3:11", parametrization=Fourier(decay=1.2, colours=measured(images)))
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.canvas import Canvas, Draw
from torchloupe_core.colour import Colours, as_colours
from torchloupe_core.errors import BadInput, UnknownName

__all__ = [
    "CPPN",
    "PARAMETRIZATIONS",
    "Fourier",
    "LowRes",
    "Parametrization",
    "ParametrizationLike",
    "Pixel",
    "Pyramid",
    "Shared",
    "as_parametrization",
    "frequencies",
    "resized",
]

Shape = tuple[int, int, int]
Size = tuple[int, int]

SD = 0.01  # of the numbers at the start
MAGIC = 4.0  # Lucid's divisor of frequencies' images: larger saturates less


@dataclass(frozen=True)
class Parametrization:
    """How images `[n, C, H, W]` are made of numbers. colours: how channels go together, see `colour.as_colours`.

    coupled: whether the images of a batch share numbers, so that they are made together. lr: the step size of Adam
    that suits it. transparent: whether the run tells how much it was about each pixel.
    """

    coupled: ClassVar[bool] = False
    lr: ClassVar[float] = 0.05
    transparent: ClassVar[bool] = False

    def borrowed(self) -> contextlib.AbstractContextManager[None]:
        """Inside, what makes the images may be used."""
        return contextlib.nullcontext()

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        """The numbers at the start, at random, for as many images of shape (C, H, W) as there are draws."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fourier(Parametrization):
    """Amplitudes of frequencies, high ones made smaller: `1 / max(frequency, 1 / max(H, W)) ** decay`."""

    decay: float = 1.0
    sd: float = SD
    colours: Colours = "imagenet"

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        channels, height, width = shape
        frequency = frequencies(height, width)
        scale = (1.0 / frequency.clamp(min=1.0 / max(height, width)) ** self.decay)[..., None].to(device, dtype)
        spectrum = (draw(channels, *frequency.shape, 2) * self.sd).to(device, dtype)

        def decode() -> Tensor:
            whole = torch.view_as_complex(scale * canvas.tensors[0])
            values: Tensor = torch.fft.irfft2(whole, s=(height, width), norm="ortho")
            return values / MAGIC

        def encode(values: Tensor) -> list[Tensor]:
            found = torch.view_as_real(torch.fft.rfft2(values * MAGIC, norm="ortho"))
            found = F.pad(found, (0, 0, 0, spectrum.shape[3] - found.shape[3]))  # the unused one of odd widths
            return [found / scale.to(found)]

        canvas = Canvas([spectrum], decode, encode, as_colours(self.colours, channels))
        return canvas


@dataclass(frozen=True)
class Pixel(Parametrization):
    """One number for each pixel and channel."""

    sd: float = SD
    colours: Colours = "imagenet"

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        start = (draw(*shape) * self.sd).to(device, dtype)
        canvas = Canvas([start], lambda: canvas.tensors[0], lambda values: [values], as_colours(self.colours, shape[0]))
        return canvas


@dataclass(frozen=True)
class LowRes(Parametrization):
    """An image of `factor` times fewer rows and columns, enlarged bilinearly."""

    factor: int = 4
    sd: float = SD
    colours: Colours = "imagenet"

    def sizes(self, size: Size) -> list[Size]:
        """The size of the small image."""
        return [_reduced(size, self.factor)]

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        channels, height, width = shape
        (small,) = self.sizes((height, width))
        start = (draw(channels, *small) * self.sd).to(device, dtype)
        canvas = Canvas(
            [start],
            lambda: resized(canvas.tensors[0], (height, width)),
            lambda values: [F.interpolate(values, size=small, mode="area")],
            as_colours(self.colours, channels),
        )
        return canvas


@dataclass(frozen=True)
class Pyramid(Parametrization):
    """A Laplacian pyramid: images of full, half, quarter ... resolution, enlarged and added up."""

    levels: int = 4
    sd: float = SD
    colours: Colours = "imagenet"

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise BadInput(f"a pyramid has at least one level; got {self.levels}")

    def sizes(self, size: Size) -> list[Size]:
        """Of the levels, the largest first."""
        return [_reduced(size, 2**level) for level in range(self.levels)]

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        channels, height, width = shape
        sizes = self.sizes((height, width))
        start = [(draw(channels, *size) * self.sd).to(device, dtype) for size in sizes]

        def encode(values: Tensor) -> list[Tensor]:  # each level what the coarser ones leave over
            found: list[Tensor] = []
            for size in reversed(sizes):
                level = F.interpolate(values, size=size, mode="area") if size != sizes[0] else values
                values = values - resized(level, (height, width))
                found.insert(0, level)
            return found

        canvas = Canvas(
            start,
            lambda: _added([resized(tensor, (height, width)) for tensor in canvas.tensors]),
            encode,
            as_colours(self.colours, channels),
        )
        return canvas


@dataclass(frozen=True)
class Shared(Parametrization):
    """Each image's own frequencies, and coarse images that all of the batch share, so that shapes fall together.

    factors: by how much the shared images are coarser. As for aligned interpolations in Mordvintsev et al. 2018.
    """

    coupled: ClassVar[bool] = True

    factors: tuple[int, ...] = (2, 4, 8, 16)
    decay: float = 1.0
    sd: float = SD
    colours: Colours = "imagenet"

    def sizes(self, size: Size) -> list[Size]:
        """Of the shared images."""
        return [_reduced(size, factor) for factor in self.factors]

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        channels, height, width = shape
        own = Fourier(self.decay, self.sd, self.colours).canvas(draw, shape, device, dtype)
        common = [(draw.common(1, channels, *size) * self.sd).to(device, dtype) for size in self.sizes(shape[1:])]

        def decode() -> Tensor:
            shared = [resized(tensor, (height, width)) for tensor in canvas.tensors[1:]]
            return _added([own.decode(), *shared])

        def encode(values: Tensor) -> list[Tensor]:  # all in the images' own part
            return [*own.encoded(values), *(torch.zeros_like(tensor) for tensor in common)]

        canvas = Canvas([*own.tensors, *common], decode, encode, own.colours)
        return canvas


@dataclass(frozen=True)
class CPPN(Parametrization):
    """A small network from a pixel's coordinates to its colour, one network for each image (Stanley 2007).

    hidden: channels between layers; each gives its arc tangent and the square of that. Images of any size are smooth.
    """

    lr: ClassVar[float] = 0.005

    layers: int = 8
    hidden: int = 24
    colours: Colours = None

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        channels, height, width = shape
        limit = math.sqrt(3)  # so that coordinates have a standard deviation of 1
        rows, columns = (torch.linspace(-limit, limit, side, dtype=dtype, device=device) for side in (height, width))
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)  # [2, H * W]
        start: list[Tensor] = []
        for layer in range(self.layers):
            last = layer == self.layers - 1
            into, out = (2 if layer == 0 else 2 * self.hidden), (channels if last else self.hidden)
            weight = draw(out, into) * (0.0 if last else math.sqrt(1 / into))  # grey at the start
            start += [weight.to(device, dtype), torch.zeros(len(draw), out, dtype=dtype, device=device)]

        def decode() -> Tensor:
            values = place.expand(len(draw), -1, -1)
            pairs = list(zip(canvas.tensors[::2], canvas.tensors[1::2], strict=True))
            for index, (weight, bias) in enumerate(pairs):
                values = torch.baddbmm(bias[:, :, None], weight, values)
                if index < len(pairs) - 1:
                    bent = values.atan()
                    values = torch.cat([bent / 0.67, bent.square() / 0.6], 1)
            return values.view(len(draw), channels, height, width)

        canvas = Canvas(start, decode, None, as_colours(self.colours, channels))
        return canvas


def _maco() -> Parametrization:
    from torchloupe_core.maco import MaCo  # which is one of these

    return MaCo()


PARAMETRIZATIONS: Mapping[str, Callable[[], Parametrization]] = {
    "fourier": Fourier,
    "pixel": Pixel,
    "pyramid": Pyramid,
    "lowres": LowRes,
    "shared": Shared,
    "cppn": CPPN,
    "maco": _maco,
}
ParametrizationLike = str | Parametrization


def as_parametrization(parametrization: ParametrizationLike) -> Parametrization:
    """The parametrisation of a name, or the one given. Raises `UnknownName`."""
    if isinstance(parametrization, Parametrization):
        return parametrization
    if not isinstance(parametrization, str):
        raise BadInput(f"parametrization is a name or a Parametrization; got {type(parametrization).__name__}")
    if parametrization not in PARAMETRIZATIONS:
        raise UnknownName.of("parametrization", parametrization, PARAMETRIZATIONS)
    return PARAMETRIZATIONS[parametrization]()


def frequencies(height: int, width: int) -> Tensor:
    """Cycles a pixel of each coefficient of a real image's transform, `[H, W // 2 + 1]`; odd widths have one more.

    That column is Lucid's, which cuts off a pixel instead; here it stands for nothing.
    """
    columns = torch.fft.fftfreq(width, dtype=torch.float64)[: width // 2 + 1 + width % 2]
    return torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64)[:, None], columns)


def resized(values: Tensor, size: Size) -> Tensor:
    """Bilinearly, corners on corners as in Lucid."""
    if tuple(values.shape[2:]) == size:
        return values
    return F.interpolate(values, size=size, mode="bilinear", align_corners=True)


def _reduced(size: Size, factor: int) -> Size:
    if factor < 1:
        raise BadInput(f"resolution is reduced by a factor of at least 1; got {factor}")
    return max(1, size[0] // factor), max(1, size[1] // factor)


def _added(parts: Sequence[Tensor]) -> Tensor:
    total: Tensor = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
