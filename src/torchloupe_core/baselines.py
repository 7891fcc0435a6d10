"""What stands in for a pixel that is taken away."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput
from torchloupe_core.query import Query

__all__ = ["RADIUS", "Baseline", "blurred", "filling"]

Baseline = Tensor | float | str | None

RADIUS = 5 / 224  # of the shorter side: at 224 pixels a kernel of 11 with sigma 5 (Petsiuk 2018, insertion)


def filling(query: Query, baseline: Baseline) -> Tensor:
    """The baseline of each image, `[N, C, H, W]`, or `[1, C, H, W]` where all share one.

    baseline: a number, `[C, H, W]` or `[N, C, H, W]` in units of the model's input; None is zero, the mean colour of a
    normalised input; "mean" is each image's own mean colour, "blur" each image blurred. Raises `BadInput`.
    """
    inputs = query.inputs.detach()
    if isinstance(baseline, str):
        if baseline == "blur":
            return blurred(inputs)
        if baseline == "mean":
            return inputs.mean((2, 3), keepdim=True).expand_as(inputs)
        raise BadInput(f'baseline is a number, a tensor, "blur" or "mean"; got {baseline!r}')
    try:
        given = torch.as_tensor(0.0 if baseline is None else baseline).detach().to(inputs)
        n = len(given) if given.ndim == 4 else 1
        found = given.expand(n, *query.shape)
    except (RuntimeError, TypeError, ValueError):
        got = list(baseline.shape) if isinstance(baseline, Tensor) else repr(baseline)
        raise BadInput(f"baseline is a number or [C, H, W] = {list(query.shape)}; got {got}") from None
    if n not in (1, len(inputs)):
        raise BadInput(f"baseline holds {n} images for {len(inputs)}; give one for all or one for each")
    if not found.isfinite().all():
        raise BadInput("baseline holds NaN or infinity")
    return found


def blurred(images: Tensor, sigma: float | None = None) -> Tensor:
    """Images `[N, C, H, W]` under a Gaussian, their edges repeated outwards.

    sigma: its standard deviation in pixels, cut off at three times that. Without it the blur of the insertion measure,
    scaled to the shorter side: sigma 5 and a kernel 11 wide at 224 pixels, never narrower than 3.
    """
    if sigma is None:
        sigma = RADIUS * min(images.shape[2:])
        radius = max(1, round(sigma))
    else:
        radius = max(1, math.ceil(3 * sigma))
    exact = torch.promote_types(images.dtype, torch.float32)
    offsets = torch.arange(-radius, radius + 1, dtype=exact, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)  # [C, 1, 1, k]: each channel by itself
    padded = F.pad(images.to(exact), [radius] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=images.shape[1]).to(images.dtype)
