"""Attention matrices as a forward pass applies them, fused or not, and the tokens they run over.

A map from attention matrices is right where they are all that mixes the tokens: `plain_attention` tries that on noise
and refuses any other model.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Handle, Shape
from torchloupe_core.layout import Grid, Layout
from torchloupe_core.watch import Exchange

__all__ = ["ExplicitAttention", "Tokens", "per_head", "plain_attention", "with_graph"]

PRODUCTS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})
SOFTMAX = frozenset({torch.softmax, Tensor.softmax, F.softmax})


@dataclass(frozen=True)
class Tokens:
    """The tokens that attention runs over: `prefix` class and register tokens, then the patches of a grid (h, w).

    read: the rows of the last matrix that the output reads: the class token's, all that are pooled, or those of the
    learned queries that pool.
    """

    prefix: int
    grid: Grid
    read: tuple[int, ...]

    def map(self, values: Tensor) -> Tensor:
        """A value for each token `[N, L]` as a map over the patches `[N, h, w]`."""
        return values[:, self.prefix :].reshape(-1, *self.grid)


class ExplicitAttention(TorchFunctionMode):
    """Inside, `softmax(q k^T) v` is computed step by step, fused or not: `exchange(matrix)` is used for each matrix.

    A matrix is `[N, heads, L, S]` or `[N * heads, L, S]`, its rows sum to 1. unused: the softmax results that were not
    multiplied with values as they are, with the dimension they sum to 1 over. The mode belongs to the thread, as the
    gradient mode does, and touches neither the model nor torch.
    """

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        self.unused: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _undispatched(func)(*args, **kwargs)
        if func is F.linear and args:  # which multiplies transposed inputs one by one
            args = (args[0].contiguous(), *args[1:])
        if func in PRODUCTS and len(args) == 2 and id(args[0]) in self.unused:
            matrix, dim = self.unused[id(args[0])]
            if dim == matrix.ndim - 1:
                del self.unused[id(matrix)]
                return func(self.exchange(matrix), args[1], **kwargs)
        result = func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if func in SOFTMAX and isinstance(dim, int):
            self.unused[id(result)] = result, dim % result.ndim
        return result

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # not applied: the model is in eval mode
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`F.scaled_dot_product_attention` as its documentation spells it out."""
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self.exchange(scores.softmax(-1)) @ value


def _undispatched(func: Any) -> Callable[..., Any]:
    """A copy of a function of torch's that asks for no override of itself, so that its parts meet the mode."""
    scope = {**func.__globals__, "has_torch_function": lambda arguments: False}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def per_head(matrix: Tensor, n: int) -> Tensor:
    """An attention matrix of n images, heads folded into the batch or not, as `[N, heads, L, L]`."""
    return matrix.reshape(n, -1, *matrix.shape[-2:])


def with_graph(kept: list[Tensor]) -> Exchange:
    """Keeps each matrix in a list; the graph begins at the first, so that nothing before it is differentiated."""

    def keep(matrix: Tensor) -> Tensor:
        kept.append(matrix if kept else matrix.detach().requires_grad_(True))
        return kept[-1]

    return keep


def plain_attention(handle: Handle, shape: Shape) -> Tokens:
    """The tokens of a model for inputs of this shape, found once by a few passes of noise.

    Raises `NotApplicable` unless each attention is over all tokens of one image, comes after the one before it, and
    nothing else mixes tokens between them. The last may be learned queries that pool the tokens.
    """
    with handle.borrow():
        return handle.kept("attention", shape, lambda: _examined(handle, shape))


def _examined(handle: Handle, shape: Shape) -> Tokens:
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0)).to(handle.device, handle.dtype)
    with handle.watch(shape=shape) as watch:
        plain = handle.logits(watch(noise))
    matrices: list[Tensor] = []
    entrance = _entrance(handle, shape)
    mode = ExplicitAttention(with_graph(matrices))
    with handle.watch(*entrance, through=True, shape=shape) as watch, torch.enable_grad(), mode:
        logits = handle.logits(watch(noise))
    length = _length(matrices, mode)
    layers = _token_layers(handle, shape, length)
    gap = (logits - plain).detach().abs().max().item()
    if not gap <= torch.finfo(plain.dtype).eps ** 0.5 * plain.abs().max().item():
        raise _refusal(f"here the output computed with them misses the model's own by {gap:.2g}")
    for earlier, later in pairwise(matrices):
        if _gradient(later, earlier) is None:
            raise _refusal("here some attentions run side by side, not one after the other")
    _require_unmixed(handle, noise, layers)
    _, layout = layers[-1]
    return Tokens(layout.prefix, layout.grid, _read(matrices[-1], [logits, *(watch[name] for name in entrance)]))


def _entrance(handle: Handle, shape: Shape) -> list[str]:
    """The classifier's input, if there is a classifier."""
    try:
        return [handle.embedding_at(shape)]
    except NotApplicable:
        return []


def _length(matrices: Sequence[Tensor], mode: ExplicitAttention) -> int:
    """L, the number of tokens: each matrix is `[1, heads, L, L]` or `[heads, L, L]`, a pooling one `[.., Q, L]`."""
    if not matrices:
        raise _refusal("no softmax(q k^T) @ v was seen in this model's forward pass")
    length = matrices[-1].shape[-1]
    blocks = matrices[:-1] if matrices[-1].shape[-2] != length else matrices
    one_image = all(matrix.shape[:-3] in ((), (1,)) for matrix in matrices)
    if not one_image or {matrix.shape[-2:] for matrix in blocks} != {(length, length)}:
        shown = dict.fromkeys(str(list(matrix.shape)) for matrix in matrices)
        raise _refusal(
            f"here its matrices for one image are {', '.join(shown)}: windows, merged tokens or class attention"
        )
    if any(softmax.shape[dim] == length for softmax, dim in mode.unused.values()):
        raise _refusal("here heads are mixed or subtracted between softmax and values")
    return length


def _token_layers(handle: Handle, shape: Shape, length: int) -> list[tuple[str, Layout]]:
    """The layers that give patch tokens, in forward order, with or without those before; the last one gives all L."""
    found = [(name, layer.layout) for name, layer in handle.trace(shape).layers.items()]
    tokens = [(name, layout) for name, layout in found if layout is not None and layout.order == "tokens"]
    whole = [layout for _, layout in tokens if layout.prefix + layout.grid[0] * layout.grid[1] == length]
    if not whole:
        raise _refusal(f"here it is over {length} things that are not the patches; state prefix= if some come before")
    alike = [(name, layout) for name, layout in tokens if layout.grid == whole[-1].grid]
    while alike[-1][1] not in whole:
        alike.pop()
    return alike


def _read(matrix: Tensor, ends: Sequence[Tensor]) -> tuple[int, ...]:
    """The rows of the last matrix that reach the output, or the embedding where the head is still all zeros."""
    for end in ends:
        gradient = _gradient(end, matrix)
        rows = [] if gradient is None else per_head(gradient, 1)[0].any(-1).any(0).nonzero().flatten().tolist()
        if rows:
            return tuple(rows)
    raise _refusal("here the output does not depend on the last attention")


def _require_unmixed(handle: Handle, noise: Tensor, layers: Sequence[tuple[str, Layout]]) -> None:
    """With each token attending to itself alone, a token must depend on its own patch alone, from first to last."""
    (first, before), (last, after) = layers[0], layers[-1]
    if first == last:
        return
    length = after.prefix + after.grid[0] * after.grid[1]
    shape = (noise.shape[1], noise.shape[2], noise.shape[3])
    with handle.watch(last, leaf=first, through=True, shape=shape) as watch, ExplicitAttention(_identity):
        watch(noise)
    for token in {0, length // 2}:
        with torch.enable_grad():
            gradient = _gradient(watch[last][:, token], watch[first])
        reached = [] if gradient is None else gradient[0, before.prefix :].any(-1).nonzero().flatten().tolist()
        if reached != [token - after.prefix] * (token >= after.prefix):
            raise _refusal("here tokens are mixed by other layers too, such as convolutions or pooling between blocks")


def _identity(matrix: Tensor) -> Tensor:
    if matrix.shape[-2] != matrix.shape[-1]:
        return matrix  # it pools
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)


def _gradient(end: Tensor, start: Tensor) -> Tensor | None:
    """The gradient of a weighted sum of `end`; None if it does not depend on `start`."""
    if not end.requires_grad:
        return None
    weights = torch.randn(end.shape, generator=torch.Generator().manual_seed(0)).to(end)
    return torch.autograd.grad(end, start, weights, retain_graph=True, allow_unused=True)[0]


def _refusal(problem: str) -> NotApplicable:
    return NotApplicable(
        "maps made of attention matrices need attention over all tokens in one block after another, and nothing else "
        f"between tokens; {problem}. Use grad_cam or saliency"
    )
