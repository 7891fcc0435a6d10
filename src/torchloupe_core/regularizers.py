"""What keeps an optimised image from high frequencies and extreme colours that no picture has.

    visualize(model, "layer3:11", regularizers={"tv": 0.1, "l2": 0.01})
    visualize(model, "layer3:11", regularizers=[TotalVariation(0.1), Blur(every=4)])

Three kinds: a penalty is added to what is minimised; a filter changes the gradient at the image before the step; a
projection changes the image after the step. All see images `[n, C, H, W]` in [0, 1], and grey is 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.baselines import blurred
from torchloupe_core.errors import BadInput, UnknownName

__all__ = [
    "L1",
    "L2",
    "REGULARIZERS",
    "Bilateral",
    "Blur",
    "ClipSmallContributions",
    "ClipSmallPixels",
    "GradientBlur",
    "GradientPyramid",
    "Patches",
    "Regularizer",
    "RegularizersLike",
    "TotalVariation",
    "as_regularizers",
]

GREY = 0.5
TINY = 1e-8  # under roots, whose gradient at zero is infinite


class Regularizer:
    """Parent of the three kinds. What a kind does not do leaves things as they are."""

    @property
    def on_gradient(self) -> bool:
        """Whether it filters the gradient at the image."""
        return type(self).filtered is not Regularizer.filtered

    @property
    def on_image(self) -> bool:
        """Whether it changes the image after a step."""
        return type(self).projected is not Regularizer.projected

    def penalty(self, images: Tensor) -> Tensor | None:
        """What is added to the loss of each image, `[n]`."""
        return None

    def filtered(self, images: Tensor, gradient: Tensor) -> Tensor:
        """The gradient to go along instead."""
        return gradient

    def projected(self, images: Tensor, gradient: Tensor, step: int) -> Tensor | None:
        """The images to go on from after a step, counted from 1; None where they stay. gradient: of the objective."""
        return None


# -- penalties --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class L2(Regularizer):
    """Weight times the mean square of a pixel's distance from grey (Simonyan 2013)."""

    weight: float = 1.0

    def penalty(self, images: Tensor) -> Tensor:
        return self.weight * (images - GREY).square().mean((1, 2, 3))


@dataclass(frozen=True)
class L1(Regularizer):
    """Weight times the mean distance of a pixel from grey."""

    weight: float = 1.0

    def penalty(self, images: Tensor) -> Tensor:
        return self.weight * (images - GREY).abs().mean((1, 2, 3))


@dataclass(frozen=True)
class TotalVariation(Regularizer):
    """Weight times the mean over pixels and channels of `(dx^2 + dy^2) ** (power / 2)` (Mahendran and Vedaldi 2015).

    dx, dy: differences to the pixel on the right and the one below; the last column and row count for nothing.
    """

    weight: float = 1.0
    power: float = 1.0

    def penalty(self, images: Tensor) -> Tensor:
        across = images[:, :, :-1, 1:] - images[:, :, :-1, :-1]
        down = images[:, :, 1:, :-1] - images[:, :, :-1, :-1]
        squares = across.square() + down.square()
        if self.power != 2:
            squares = (squares + TINY) ** (self.power / 2) - TINY ** (self.power / 2)
        return self.weight * squares.mean((1, 2, 3))


@dataclass(frozen=True, eq=False)
class Patches(Regularizer):
    """Weight times the mean squared distance of the image's patches from the nearest in a data base (Wei et al. 2015).

    database: images `[N, C, H, W]` in [0, 1] or `uint8`, of which `count` patches are taken at random places. size, in
    pixels; stride: between the image's own patches. Each patch's mean colour is taken off first, so that shapes are
    compared and colours are free.
    """

    database: Tensor = field(repr=False)
    weight: float = 1.0
    size: int = 8
    stride: int = 4
    count: int = 2048
    seed: int = 0
    _known: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        shape = list(self.database.shape)
        if len(shape) != 4 or min(shape[2:]) < self.size or self.size < 1 or self.stride < 1:
            raise BadInput(f"a data base of patches of {self.size} pixels is images [N, C, H, W]; got {shape}")

    def penalty(self, images: Tensor) -> Tensor:
        found = self._cut(images)  # [n, patches, C * size * size]
        known = self._taken().to(images)
        with torch.no_grad():
            nearest = known[torch.cdist(found.flatten(0, 1), known).argmin(1)].view_as(found)
        return self.weight * (found - nearest).square().mean((1, 2))

    def _cut(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, self.size, stride=self.stride).transpose(1, 2)
        parts = patches.view(*patches.shape[:2], images.shape[1], -1)
        return (parts - parts.mean(3, keepdim=True)).flatten(2)

    def _taken(self) -> Tensor:
        """`[count, C * size * size]`, taken once."""
        if not self._known:
            pixels = self.database.detach().float() / (255.0 if self.database.dtype == torch.uint8 else 1.0)
            source = torch.Generator().manual_seed(self.seed)
            n, _, height, width = pixels.shape
            limits = (n, height - self.size + 1, width - self.size + 1)
            places = zip(
                *(torch.randint(limit, (self.count,), generator=source).tolist() for limit in limits), strict=True
            )
            parts = [pixels[i, :, top : top + self.size, left : left + self.size] for i, top, left in places]
            self._known.append(self._cut(torch.stack(parts))[:, 0])
        return self._known[0]


# -- filters of the gradient ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientBlur(Regularizer):
    """A Gaussian blur of the gradient, sigma in pixels."""

    sigma: float = 1.0

    def filtered(self, images: Tensor, gradient: Tensor) -> Tensor:
        return blurred(gradient, self.sigma)


@dataclass(frozen=True)
class GradientPyramid(Regularizer):
    """The gradient with all scales made equally strong: each level of its Laplacian pyramid divided by its own spread.

    As in the DeepDream notebook (Mordvintsev 2015), where it favours low frequencies.
    """

    levels: int = 4

    def filtered(self, images: Tensor, gradient: Tensor) -> Tensor:
        parts, rest = [], gradient
        for _ in range(self.levels):
            if min(rest.shape[2:]) < 2:
                break
            small = _halved(rest)
            parts.append(rest - _doubled(small, rest.shape))
            rest = small
        found = _evened(rest)
        for part in reversed(parts):
            found = _doubled(found, part.shape) + _evened(part)
        return found


# -- projections of the image -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blur(Regularizer):
    """A Gaussian blur of the image after every few steps, sigma in pixels (Yosinski 2015)."""

    sigma: float = 0.5
    every: int = 4

    def projected(self, images: Tensor, gradient: Tensor, step: int) -> Tensor | None:
        return blurred(images, self.sigma) if step % self.every == 0 else None


@dataclass(frozen=True)
class Bilateral(Regularizer):
    """A blur that stops at edges, after every few steps (Tyka 2016): neighbours count by distance and by colour.

    sigma: in pixels; tone: of the difference in colour, the root of the sum of squares over channels.
    """

    sigma: float = 1.0
    tone: float = 0.2
    every: int = 4

    def projected(self, images: Tensor, gradient: Tensor, step: int) -> Tensor | None:
        if step % self.every:
            return None
        radius = max(1, round(2 * self.sigma))
        padded = F.pad(images, [radius] * 4, mode="replicate")
        total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
        height, width = images.shape[2:]
        for down in range(2 * radius + 1):
            for right in range(2 * radius + 1):
                other = padded[:, :, down : down + height, right : right + width]
                apart = ((down - radius) ** 2 + (right - radius) ** 2) / (2 * self.sigma**2)
                unlike = (other - images).square().sum(1, keepdim=True) / (2 * self.tone**2)
                weight = torch.exp(-unlike - apart)
                total, weights = total + weight * other, weights + weight
        return total / weights


@dataclass(frozen=True)
class ClipSmallPixels(Regularizer):
    """After every few steps the share of pixels nearest to grey, over all channels, becomes grey (Yosinski 2015)."""

    share: float = 0.1
    every: int = 1

    def projected(self, images: Tensor, gradient: Tensor, step: int) -> Tensor | None:
        return _greyed(images, (images - GREY).norm(dim=1), self.share) if step % self.every == 0 else None


@dataclass(frozen=True)
class ClipSmallContributions(Regularizer):
    """After every few steps the share of pixels that matter least becomes grey (Yosinski 2015).

    What a pixel contributes is approximated by its distance from grey times the gradient, over all channels.
    """

    share: float = 0.1
    every: int = 1

    def projected(self, images: Tensor, gradient: Tensor, step: int) -> Tensor | None:
        matters = ((images - GREY) * gradient).sum(1).abs()
        return _greyed(images, matters, self.share) if step % self.every == 0 else None


# -- names ------------------------------------------------------------------------------------------------------------

Regularizers = tuple[Regularizer, ...]
RegularizersLike = str | Mapping[str, float] | Sequence[Regularizer] | None

REGULARIZERS: Mapping[str, Callable[[float], Regularizer]] = {
    "l2": L2,
    "l1": L1,
    "tv": TotalVariation,
    "blur": Blur,
    "gradient_blur": GradientBlur,
    "gradient_pyramid": lambda levels: GradientPyramid(round(levels)),
    "bilateral": Bilateral,
    "clip_pixels": ClipSmallPixels,
    "clip_contributions": ClipSmallContributions,
}
SETS: Mapping[str, Regularizers] = {
    "none": (),
    "yosinski": (L2(1.0), Blur(0.5, every=4), ClipSmallPixels(0.1, every=4), ClipSmallContributions(0.1, every=4)),
}


def as_regularizers(regularizers: RegularizersLike) -> Regularizers:
    """Those of a named set, those named with their strength, or those given. Raises `UnknownName`.

    The strength of a penalty is its weight, of a blur its sigma, of clipping the share; the rest is as by default.
    """
    if regularizers is None:
        return ()
    if isinstance(regularizers, str):
        if regularizers not in SETS:
            raise UnknownName.of("set of regularizers", regularizers, SETS)
        return SETS[regularizers]
    if isinstance(regularizers, Mapping):
        for name in regularizers:
            if name not in REGULARIZERS:
                raise UnknownName.of("regularizer", name, REGULARIZERS)
        return tuple(REGULARIZERS[name](strength) for name, strength in regularizers.items())
    found = tuple(regularizers)
    if wrong := [one for one in found if not isinstance(one, Regularizer)]:
        raise BadInput(f"a regularizer is one of {', '.join(REGULARIZERS)}, or an object as L2(0.1); got {wrong[0]!r}")
    return found


# -- on images --------------------------------------------------------------------------------------------------------


def _greyed(images: Tensor, strength: Tensor, share: float) -> Tensor:
    """Grey where `strength [n, H, W]` is among each image's smallest."""
    flat = strength.flatten(1)
    count = round(share * flat.shape[1])
    if count == 0:
        return images
    weakest = flat.argsort(dim=1, stable=True)[:, :count]
    keep = torch.ones_like(flat).scatter(1, weakest, 0.0).view(strength.shape)[:, None]
    return GREY + (images - GREY) * keep


_KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def _halved(values: Tensor) -> Tensor:
    """Every second row and column of blurred values."""
    kernel = torch.tensor(_KERNEL, dtype=values.dtype, device=values.device).expand(values.shape[1], 1, 1, 5)
    padded = F.pad(values, [2] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, stride=(1, 2), groups=values.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), stride=(2, 1), groups=values.shape[1])


def _doubled(values: Tensor, shape: torch.Size) -> Tensor:
    return F.interpolate(values, size=shape[2:], mode="bilinear", align_corners=False)


def _evened(values: Tensor) -> Tensor:
    """Each image's values divided by their own root mean square."""
    return values / values.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-10)
