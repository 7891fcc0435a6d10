"""The steepest direction from an image, under three ways of measuring a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_core.canvas import Draw
from torchloupe_core.colour import mixed
from torchloupe_core.errors import BadInput
from torchloupe_core.gallery import Gallery
from torchloupe_core.making import asked, pictures
from torchloupe_core.parametrizations import Fourier, Parametrization
from torchloupe_core.targets import TargetLike

__all__ = ["descents"]

COLUMNS = ("given", "L2", "L-infinity", "decorrelated")


def descents(
    model: ModelLike,
    target: TargetLike | Sequence[TargetLike],
    images: Any,
    *,
    parametrization: Parametrization | None = None,
    device: torch.device | str | None = None,
) -> Gallery:
    """For each image the direction in which the target rises most steeply for a step of a given length.

    The length measured by L2 (the gradient itself), by L-infinity (its sign), and by L2 among the decorrelated numbers
    of a parametrisation, Fourier unless given: with pixels = A numbers the direction is A A^T gradient (Olah et al.
    2017, "preconditioning and parameterization"). `raw` are the directions, `[R, 3, C, H, W]`, of root mean square 1;
    drawn, grey is zero.
    """
    handle = opened(model, device=device)
    begun, forwards = time.perf_counter(), handle.forwards
    inputs = handle.inputs(images)
    wanted = asked(target, 1)
    if len(wanted) not in (1, len(inputs)):
        raise BadInput(f"{len(wanted)} targets for {len(inputs)} images; give one for all or one for each")
    wanted = wanted if len(wanted) == len(inputs) else wanted * len(inputs)
    with handle.borrow(), torch.enable_grad():
        leaf = handle.spec.pixels(inputs).requires_grad_(True)
        scores = handle.read(handle.spec.normalised(leaf), handle.bind(wanted, inputs))
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    kind = Fourier() if parametrization is None else parametrization
    found = torch.stack([gradient, gradient.sign(), _decorrelated(kind, gradient)], 1).float().cpu()
    found = found / found.square().mean((2, 3, 4), keepdim=True).sqrt().clamp(min=1e-12)
    drawn = torch.stack([pictures((one / 6 + 0.5).clamp(0, 1)) for one in found.unbind(1)], 1)
    shown = pictures(leaf.detach().float().cpu())[:, None]
    values = torch.full((len(wanted), len(COLUMNS)), float("nan"))
    values[:, 0] = scores.detach().float().cpu()
    return Gallery(
        method="descents",
        backend="native",
        seed=0,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(),
        options={"parametrization": str(kind)},
        images=torch.cat([shown, drawn], 1),
        rows=tuple(map(str, wanted)),
        columns=COLUMNS,
        values=values,
        indices=torch.full(values.shape, -1),
        raw=found,
    )


def _decorrelated(kind: Parametrization, gradient: Tensor) -> Tensor:
    """`A A^T gradient`, A being what makes pixels, before the sigmoid, of a parametrisation's numbers."""
    shape = (gradient.shape[1], gradient.shape[2], gradient.shape[3])
    canvas = kind.canvas(Draw(0, 0, len(gradient)), shape, gradient.device, gradient.dtype)
    with torch.enable_grad():
        total = (mixed(canvas.decode(), canvas.colours) * gradient).sum()
        numbers = torch.autograd.grad(total, canvas.tensors)
    with torch.no_grad():
        canvas.go_back(numbers)
        return mixed(canvas.decode(), canvas.colours)
