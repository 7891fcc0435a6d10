"""Maps made of a token model's attention matrices: rollout, and attention weighed by the target's gradient.

A matrix `[N, heads, L, L]` says how much each token (row) takes from each token (column). Multiplied through the
blocks, each beside the identity of its skip connection, they say how much the tokens that are read in the end take from
each patch. What MLPs and value vectors do is left out of account.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from torchloupe_core.attention import ExplicitAttention, Tokens, per_head, plain_attention, with_graph
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Reading, pick
from torchloupe_core.query import Map, Query, finite
from torchloupe_core.registry import method
from torchloupe_core.targets import Bound
from torchloupe_core.watch import Exchange

__all__ = ["attention_relevance", "attention_rollout"]

JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda matrix: matrix.mean(1),
    "max": lambda matrix: matrix.amax(1),
    "min": lambda matrix: matrix.amin(1),
}


@method(
    "explain",
    "attention_rollout",
    needs=("attention",),
    cost="1 forward",
    paper="Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers",
    signed=False,
)
def attention_rollout(query: Query, *, heads: Literal["mean", "max", "min"] = "mean") -> Map:
    """`R <- rows_to_1(A + I) R` from block to block, from `R = I`. It knows no target: the map is the same for all.

    The map is the class token's row of R over the patches, or the mean of the rows that the model pools. heads: how the
    matrices of a block's heads become one.
    """
    if heads not in JOINED:
        raise BadInput(f"heads is one of {', '.join(map(repr, JOINED))}; got {heads!r}")
    tokens = plain_attention(query.handle, query.shape)
    return _together(query.each(lambda part: _rollout(part, tokens, JOINED[heads])))


@method(
    "explain",
    "attention_relevance",
    needs=("attention", "gradient"),
    cost="1 forward + 1 backward",
    paper="Chefer, Gur and Wolf 2021, Generic Attention-model Explainability, for self-attention",
    signed=False,
)
def attention_relevance(query: Query) -> Map:
    """`R <- R + mean_heads(relu(A * d target / d A)) R` from block to block, from `R = I`.

    The map is a row of R over the patches: of the token that the target reads after the last attention before it, the
    class token for a logit, a patch for a neuron; where it reads several, the mean of their rows.
    """
    tokens = plain_attention(query.handle, query.shape)
    return _together(query.each(lambda part: _relevance(part, tokens)))


def _rollout(query: Query, tokens: Tokens, join: Callable[[Tensor], Tensor]) -> Map:
    joined: list[Tensor] = []  # [N, L, L] for each block

    def keep(matrix: Tensor) -> Tensor:
        joined.append(_exact(join(per_head(matrix, len(query.inputs)))))
        return matrix

    reading = _reading(query, keep, through=True)
    row = torch.zeros_like(joined[-1][:, :, 0])  # [N, L]
    row[:, list(tokens.read)] = 1 / len(tokens.read)
    for matrix in reversed(joined):  # the rows asked for alone, so from the last block to the first
        row = _before(row / (matrix.sum(-1) + _square(matrix)), matrix)
    return Map(tokens.map(row), scores=finite(pick(reading, query.targets)))


def _relevance(query: Query, tokens: Tokens) -> Map:
    matrices: list[Tensor] = []
    with torch.enable_grad():
        reading = _reading(query, with_graph(matrices))
        scores = finite(pick(reading, query.targets))
        for bound in dict.fromkeys(query.targets):
            _require_one_depth(bound, reading, matrices)
    gradients = torch.autograd.grad(scores, matrices, torch.ones_like(scores), allow_unused=True)
    images = len(scores)
    row = _exact(matrices[-1].new_zeros(images, matrices[-1].shape[-2]))  # [N, L]
    for matrix, gradient in zip(reversed(matrices), reversed(gradients), strict=True):
        if gradient is not None:
            slope = _exact(per_head(gradient, images))  # [N, heads, L, L]
            read = slope.any(-1).any(1).to(slope)
            row = torch.where(row.any(1, keepdim=True), row, read / read.sum(1, keepdim=True).clamp(min=1))
            row = _before(row, (per_head(matrix.detach(), images) * slope).relu().mean(1))
    return Map(tokens.map(row), scores=scores.detach())


def _reading(query: Query, exchange: Exchange, *, through: bool = False) -> Reading:
    """One forward pass, no further than the targets read unless `through`; `exchange` sees each attention matrix."""
    names = dict.fromkeys(name for bound in query.targets for name in bound.target.layers)
    through = through or any(bound.target.reads_output for bound in query.targets)
    with query.handle.watch(*names, through=through, shape=query.shape) as watch, ExplicitAttention(exchange):
        return Reading(query.handle, watch, watch(query.inputs))


def _require_one_depth(bound: Bound, reading: Reading, matrices: Sequence[Tensor]) -> None:
    """R has its rows after one block; a target that reads tokens after several has none of its own."""
    places = {getattr(atom, "layer", None): Bound(bound.target, ((1.0, atom),)) for _, atom in bound.terms}
    values = [one.read(reading) for one in places.values()]
    if not all(value.requires_grad for value in values):
        raise NotApplicable(f"{bound.target} reads a layer before the first attention; use grad_cam or a later layer")
    if len(places) > 1 and len({_depth(value, matrices) for value in values}) > 1:
        raise NotApplicable(f"{bound.target} reads tokens after different blocks; ask about each alone or use grad_cam")


def _depth(value: Tensor, matrices: Sequence[Tensor]) -> int:
    """How many of the matrices come before a value."""
    gradients = torch.autograd.grad(value.sum(), matrices, retain_graph=True, allow_unused=True)
    return sum(gradient is not None for gradient in gradients)


def _before(row: Tensor, matrix: Tensor) -> Tensor:
    """Rows `[N, L]` one block earlier, times `A + I`; times A alone where learned queries pool, which skip nothing."""
    taken = torch.bmm(row[:, None], matrix)[:, 0]
    return row + taken if _square(matrix) else taken


def _square(matrix: Tensor) -> bool:
    return matrix.shape[-2] == matrix.shape[-1]


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _together(maps: Sequence[Map]) -> Map:
    scores = [found.scores for found in maps if found.scores is not None]
    return Map(torch.cat([found.values for found in maps]), scores=torch.cat(scores))
