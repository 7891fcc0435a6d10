"""A gradient for units that are off: a rectifier that lets nothing through lets through what would switch it on.

A unit behind a ReLU that is off everywhere has no gradient, so an image would stay as it began, grey. Lucid redirects
the gradient of ReLU in the first steps (`redirected_relu_grad`); here it is asked for only where nothing gets through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Redirected"]

RELU = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})
CLIPPED = frozenset({F.relu6, F.hardtanh, F.hardtanh_})  # ReLU6 modules call hardtanh


class Redirected(TorchFunctionMode):
    """Inside, a rectifier through which none of an image's gradient gets passes on what raises the objective.

    That is the gradient that does not push values further into where they are cut off; and if that is nothing either,
    as for a target that wants a unit lower which is off already, the whole gradient, as if there were no rectifier.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELU and func not in CLIPPED:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        low, high, in_place = _limits(func, args[1:], kwargs)
        return _Rectifier.apply(x, low, high, in_place)


class _Rectifier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, in_place: bool) -> Tensor:
        if in_place:
            ctx.mark_dirty(x)
        rectified = x.clamp_(low, high) if in_place else x.clamp(low, high)
        ctx.save_for_backward(rectified)
        ctx.limits = low, high
        return rectified

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None, None]:
        (rectified,) = ctx.saved_tensors
        below, above = rectified <= ctx.limits[0], rectified >= ctx.limits[1]
        passed = given * ~(below | above)
        raising = given * ~((below & (given < 0)) | (above & (given > 0)))
        return _first_that_acts(passed, raising, given), None, None, None


def _first_that_acts(*gradients: Tensor) -> Tensor:
    """Image by image the first of several gradients that is not zero."""
    found = gradients[-1]
    for gradient in reversed(gradients[:-1]):
        acts = gradient.flatten(1).any(1).view(-1, *(1,) * (gradient.ndim - 1))
        found = torch.where(acts, gradient, found)
    return found


def _limits(func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float, bool]:
    """Of one call: the lower and upper limit, and whether it writes into its input."""
    in_place = func.__name__.endswith("_")
    if func in RELU:
        return 0.0, float("inf"), in_place or bool(kwargs.get("inplace", rest[0] if rest else False))
    if func is F.relu6:
        return 0.0, 6.0, bool(kwargs.get("inplace", rest[0] if rest else False))
    given = {"min_val": -1.0, "max_val": 1.0, "inplace": False, **kwargs}
    given.update(zip(given, rest, strict=False))
    return float(given["min_val"]), float(given["max_val"]), in_place or bool(given["inplace"])
