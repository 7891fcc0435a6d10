"""What is done to images at random before the network sees them, so that they hold from more than one point of view.

    visualize(model, "layer3:11", transforms=[Pad(12), Jitter(8), Rotate((-5, 0, 5))])

Each takes images `[n, C, H, W]` in [0, 1] and a random source on the CPU, and draws once for all images, so that
neither their number nor the device matters. Named sets: "distill" (Olah 2017), "yosinski", "maco" and "none".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput, UnknownName

__all__ = [
    "SETS",
    "Crops",
    "Jitter",
    "Noise",
    "Pad",
    "Roll",
    "Rotate",
    "Scale",
    "Transform",
    "TransformsLike",
    "Views",
    "as_transforms",
]

Transform = Callable[[Tensor, Generator], Tensor]
TransformsLike = str | Sequence[Transform] | None

GREY = 0.5


@dataclass(frozen=True)
class Pad:
    """A frame of `width` pixels, of one value or with fill="reflect" of the image's own mirror image."""

    width: int
    fill: float | Literal["reflect"] = GREY

    def __post_init__(self) -> None:
        if self.width < 0:
            raise BadInput(f"Pad takes a width of at least 0 pixels; got {self.width}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        if self.fill == "reflect":
            return F.pad(images, [self.width] * 4, mode="reflect")
        return F.pad(images, [self.width] * 4, value=float(self.fill))


@dataclass(frozen=True)
class Jitter:
    """Moves the images by up to `pixels`: of each side as many rows and columns are cut off at random places."""

    pixels: int

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise BadInput(f"Jitter takes at least 0 pixels; got {self.pixels}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        height, width = images.shape[2] - self.pixels, images.shape[3] - self.pixels
        if min(height, width) < 1:
            raise BadInput(f"Jitter({self.pixels}) leaves nothing of images of {_size(images)}")
        top, left = torch.randint(self.pixels + 1, (2,), generator=generator).tolist()
        return images[:, :, top : top + height, left : left + width]


@dataclass(frozen=True)
class Roll:
    """Moves the images by up to `pixels` either way; what leaves on one side comes back on the other."""

    pixels: int

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise BadInput(f"Roll takes at least 0 pixels; got {self.pixels}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        down, right = torch.randint(-self.pixels, self.pixels + 1, (2,), generator=generator).tolist()
        return images.roll((down, right), (2, 3))


@dataclass(frozen=True)
class Scale:
    """Enlarges or reduces the images by one of the factors, bilinearly."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) <= 0:
            raise BadInput(f"Scale takes factors above 0; got {self.factors}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        factor = _one_of(self.factors, generator)
        size = [max(1, round(side * factor)) for side in images.shape[2:]]
        if size == list(images.shape[2:]):
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Rotate:
    """Turns the images about their centre by one of the angles, in degrees, counter-clockwise.

    Bilinear. What comes in from outside is the image's border, continued.
    """

    angles: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.angles:
            raise BadInput("Rotate takes at least one angle, in degrees")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        angle = math.radians(_one_of(self.angles, generator))
        if angle == 0:
            return images
        (height, width), (sine, cosine) = images.shape[2:], (math.sin(angle), math.cos(angle))
        # In coordinates that run from -1 to 1 on either axis.
        theta = [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]
        matrix = torch.tensor(theta, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Noise:
    """Adds normal noise of a standard deviation, in units of the pixel range."""

    sd: float

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        # Drawn for one image: the same for each, however many there are.
        noise = torch.randn(images.shape[1:], generator=generator)
        return images + self.sd * noise.to(images)


@dataclass(frozen=True)
class Crops:
    """Several square crops of each image in its place, with a side of a share of the image's between two limits.

    Around places that are normal about the centre (Fel 2023: standard deviation 0.15 of the side), all of one size in a
    step. Gives `[views * n, C, h, w]`: all images' first crop, then all images' second one.
    """

    low: float = 0.2
    high: float = 0.25
    views: int = 6
    spread: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1 or self.views < 1:
            raise BadInput(f"Crops takes shares 0 < low <= high <= 1 and at least one view; got {self}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        share = self.low + (self.high - self.low) * float(torch.rand((), generator=generator))
        height, width = (max(1, round(share * side)) for side in images.shape[2:])
        centres = 0.5 + self.spread * torch.randn(self.views, 2, generator=generator)
        parts = []
        for row, column in centres.tolist():
            top = _between(round(row * images.shape[2] - height / 2), images.shape[2] - height)
            left = _between(round(column * images.shape[3] - width / 2), images.shape[3] - width)
            parts.append(images[:, :, top : top + height, left : left + width])
        return torch.cat(parts)


SETS: dict[str, tuple[Transform, ...]] = {
    "distill": (
        Pad(12),
        Jitter(8),
        Scale(tuple(1 + (i - 5) / 50 for i in range(11))),
        Rotate((*range(-10, 11), 0, 0, 0, 0, 0)),
        Jitter(4),
    ),
    "yosinski": (Pad(8), Jitter(16)),  # by up to 8 pixels either way, as the CS231n notes render it
    "maco": (Crops(), Noise(0.1)),
    "none": (),
}


def as_transforms(transforms: TransformsLike) -> tuple[Transform, ...]:
    """The transforms of a named set, or those given; none for None. Raises `UnknownName`."""
    if transforms is None:
        return ()
    if isinstance(transforms, str):
        if transforms not in SETS:
            raise UnknownName.of("set of transforms", transforms, SETS)
        return SETS[transforms]
    found = tuple(transforms)
    if wrong := [one for one in found if not callable(one)]:
        raise BadInput(f"a transform is a function of images and a random source, as Jitter(8); got {wrong[0]!r}")
    return found


class Views:
    """What the network is shown of the images at each step: their transforms, one after the other.

    What is then larger than `size` (H, W), the images' own, is cut to it around the centre, and what is not of the size
    `shown` is resized to it, so that the network sees one size throughout. The draws depend on the seed alone.
    """

    def __init__(
        self, transforms: Sequence[Transform], size: tuple[int, int], shown: tuple[int, int], seed: int
    ) -> None:
        self.transforms, self.size, self.shown = tuple(transforms), size, shown
        self.generator = Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> Tensor:
        for transform in self.transforms:
            images = transform(images, self.generator)
        height, width = (min(side, most) for side, most in zip(images.shape[2:], self.size, strict=True))
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        images = images[:, :, top : top + height, left : left + width]
        if (height, width) == self.shown:
            return images
        smaller = height > self.shown[0] or width > self.shown[1]
        return F.interpolate(images, size=self.shown, mode="bilinear", align_corners=False, antialias=smaller)


def _one_of(values: Sequence[float], generator: Generator) -> float:
    return values[int(torch.randint(len(values), (), generator=generator))]


def _between(place: int, most: int) -> int:
    return min(max(place, 0), most)


def _size(images: Tensor) -> str:
    return f"{images.shape[2]}x{images.shape[3]}"
