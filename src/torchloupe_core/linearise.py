"""A forward pass without its nonlinearities: rectifiers pass everything, the maximum of a window becomes its mean.

What is left is affine in any activation, unless the model multiplies two of them or normalises by what it sees.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchloupe_core.errors import NotApplicable

__all__ = ["Linearised"]

RECTIFIERS = frozenset(
    {"relu", "relu6", "leaky_relu", "rrelu", "prelu", "elu", "selu", "celu"}
    | {"gelu", "silu", "mish", "hardswish", "hardtanh", "softplus"}
)
# What bends or multiplies activations otherwise, for the message that says why a model is not linear.
BENT = frozenset(
    {"abs", "amax", "amin", "clamp", "clamp_min", "clamp_max", "exp", "log", "max", "maximum", "min", "minimum", "pow"}
    | {"group_norm", "instance_norm", "layer_norm", "local_response_norm", "norm", "normalize", "rms_norm", "rsqrt"}
    | {"hardsigmoid", "log_softmax", "multi_head_attention_forward", "sigmoid", "softmax", "sqrt", "tanh"}
)
PRODUCTS = frozenset({"bmm", "div", "einsum", "matmul", "mul", "scaled_dot_product_attention", "truediv"})


class Linearised(TorchFunctionMode):
    """Inside, forward passes run without rectifiers and with mean in place of maximum pooling.

    exchanged: how often each was, on activations that move. suspects: functions seen that are not linear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exchanged: Counter[str] = Counter()
        self.suspects: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        name = getattr(func, "__name__", "")
        kind, moving = name.strip("_"), _moving((*args, *options.values()))
        if kind in RECTIFIERS:
            func = _rectifier_in_place if name.endswith("_") or options.get("inplace") else _rectifier
        elif kind in POOLING:
            func = POOLING[kind]
        elif moving and (kind in BENT or (kind in PRODUCTS and moving > 1)):
            self.suspects[kind] = None
        if moving and (kind in RECTIFIERS or kind in POOLING):
            self.exchanged[kind] += 1
        return func(*args, **options)


def _rectifier(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input.clone()  # what follows may write into the result


def _rectifier_in_place(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _mean_pool(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if return_indices or dilation not in (1, (1, 1), [1, 1]):
        raise NotApplicable("max pooling with dilation or indices has no counterpart among mean pooling")
    return F.avg_pool2d(input, kernel_size, stride or None, padding, ceil_mode)


def _adaptive_mean_pool(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
    return F.adaptive_avg_pool2d(input, output_size)


POOLING = {"max_pool2d": _mean_pool, "adaptive_max_pool2d": _adaptive_mean_pool}


def _moving(values: Any) -> int:
    """How many of the tensors depend on the activation asked about: parameters are frozen meanwhile."""
    flat = [one for value in values for one in (value if isinstance(value, (tuple, list)) else (value,))]
    return sum(isinstance(one, Tensor) and one.requires_grad for one in flat)
