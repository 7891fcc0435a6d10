"""Images made by a generator: its code is optimised, so that only what it can make is made.

Nguyen et al. 2016, Synthesizing the preferred inputs for neurons in neural networks via deep generator networks
(DGN-AM); Nguyen et al. 2017, Plug & Play Generative Networks (PPGN), which also pull the code towards what a denoiser
makes of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchloupe_core.borrow import borrowed
from torchloupe_core.canvas import Canvas, Draw
from torchloupe_core.errors import BadInput
from torchloupe_core.parametrizations import Parametrization, Shape

__all__ = ["Prior", "as_prior"]

Range = Literal["pixels", "symmetric"]
Denoise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prior(Parametrization):
    """A generator `code [n, *code] -> images [n, C, h, w]`, which is borrowed and given back as it was.

    code: the size of one code, without the batch. values: the generator's images are "pixels" in [0, 1] or "symmetric"
    in [-1, 1]; what lies outside is cut off. sd: of the codes at the start. limits: what each number of a code is kept
    between after every step, as for codes behind a ReLU. decay: weight of the codes' mean square, subtracted from the
    objective. denoise: from codes to likelier codes; after every step `pull` times the difference is added, and normal
    noise of a standard deviation (PPGN, equation 5). Images of another size than asked for are resized.
    """

    lr: ClassVar[float] = 0.05

    generator: nn.Module
    code: tuple[int, ...]
    values: Range = "pixels"
    sd: float = 1.0
    limits: tuple[float, float] | None = None
    decay: float = 0.0
    denoise: Denoise | None = field(default=None, repr=False)
    pull: float = 0.1
    noise: float = 0.0

    def __str__(self) -> str:
        rest = f"values={self.values!r}, sd={self.sd}, limits={self.limits}, decay={self.decay}"
        steps = "" if self.denoise is None else f", denoise, pull={self.pull}, noise={self.noise}"
        return f"Prior({type(self.generator).__name__}, code={self.code}, {rest}{steps})"

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        with contextlib.ExitStack() as given_back:
            for one in (self.generator, self.denoise):
                if isinstance(one, nn.Module):
                    given_back.enter_context(borrowed(one))
            yield

    def canvas(self, draw: Draw, shape: Shape, device: torch.device, dtype: torch.dtype) -> Canvas:
        start = (draw(*self.code) * self.sd).to(device, dtype)
        return _Codes(self, start, draw, shape)


class _Codes(Canvas):
    """Codes, and what the generator makes of them."""

    def __init__(self, prior: Prior, codes: Tensor, draw: Draw, shape: Shape) -> None:
        super().__init__([codes], lambda: codes)
        self._prior, self._draw, self._shape = prior, draw, shape
        if prior.limits is not None:
            with torch.no_grad():
                codes.clamp_(*prior.limits)

    def images(self) -> Tensor:
        images = self._prior.generator(self.tensors[0])
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != self._shape[0]:
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise BadInput(f"the prior's generator makes images [n, {self._shape[0]}, h, w] of codes; it gave {got}")
        images = (images + 1) / 2 if self._prior.values == "symmetric" else images
        if tuple(images.shape[2:]) != self._shape[1:]:
            images = F.interpolate(images, self._shape[1:], mode="bilinear", align_corners=False, antialias=True)
        return images.clamp(0, 1)

    def penalty(self) -> Tensor | None:
        if not self._prior.decay:
            return None
        return self._prior.decay * self.tensors[0].square().flatten(1).mean(1)

    def settle(self) -> None:
        prior, (codes,) = self._prior, self.tensors
        with torch.no_grad():
            if prior.denoise is not None:
                codes.add_(prior.pull * (prior.denoise(codes) - codes))
            if prior.noise:
                codes.add_(prior.noise * self._draw(*prior.code).to(codes))
            if prior.limits is not None:
                codes.clamp_(*prior.limits)


def as_prior(prior: Prior | nn.Module) -> Prior:
    """A prior, or one of a generator whose codes are what its first linear layer takes. Raises `BadInput`."""
    if isinstance(prior, Prior):
        return prior
    if not isinstance(prior, nn.Module):
        raise BadInput(f"prior is a torch.nn.Module from codes to images, or a Prior; got {type(prior).__name__}")
    first = next((part for part in prior.modules() if isinstance(part, nn.Linear)), None)
    if first is None:
        raise BadInput("the size of the generator's codes is not known; give prior=tl.Prior(generator, code=...)")
    return Prior(prior, (first.in_features,))
