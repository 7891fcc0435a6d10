"""What each operation of torch reads of its inputs: one rule for each family of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.reach import NOTHING, Call, Reach, Rule, Taps, around, known, nothing, squeezed, together

__all__ = ["rule_of"]

MASKED = -100.0  # added to attention scores by Swin for "not at all"; others add -inf

_RULES: dict[str, Rule] = {}


def rule_of(call: Call) -> Rule | None:
    """The rule for an operation, in place or not; None if there is none."""
    name = call.name.removesuffix("_")
    if name in _RULES:
        return _RULES[name]
    if name.startswith("_scaled_dot_product"):
        return _attention
    if name.lstrip("_").startswith("upsample"):
        return _resized
    if torch.Tag.pointwise in call.func.tags:
        return _pointwise
    return Call.moved if call.func.is_view else None


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


# -- element by element, and moves ------------------------------------------------------------------------------------


def _pointwise(call: Call) -> Reach:
    return around(call.reaches, call.shape)


_rule("hardswish", "hardtanh", "threshold", "dropout", "_prelu_kernel", "rrelu_with_noise", "leaky_relu")(_pointwise)


@_rule("add", "masked_fill")
def _masked(call: Call) -> Reach:
    """Scores plus a mask: where the mask is very negative, nothing is left of them."""
    reach, off = _pointwise(call), None
    constants = [one for one in call.args if isinstance(one, Tensor) and known(one) is None and not one.is_meta]
    before = next((one.off for one in call.reaches if one.off is not None), None)
    if call.name == "add" and constants and constants[0].is_floating_point():
        off = constants[0] <= MASKED
    elif call.name == "masked_fill" and constants and isinstance(call.args[2], (int, float)):
        off = constants[0] if call.args[2] <= MASKED else None
    if off is not None and off.any():
        off = off.cpu().expand(call.shape)
        return replace(reach, off=off if before is None else off | before)
    return replace(reach, off=None if before is None else before.expand(call.shape))


@_rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "_softmax_backward_data")
def _same(call: Call) -> Reach:
    return call.reaches[0]


@_rule("copy")
def _copied(call: Call) -> Reach:
    source = call.reach("src")
    return nothing(call.shape) if source is None else source.expanded(call.shape)


@_rule("fill", "zero")
def _filled(call: Call) -> Reach:
    return around([nothing(()), call.reach("value")], call.shape)


@_rule("as_strided")
def _strided(call: Call) -> Reach | Sequence[Reach]:
    if known(call.args[0]) is not None and call.reaches[0].shape == call.shape:  # for another memory order only
        return call.reaches[0]
    raise NotImplementedError


@_rule("view", "_unsafe_view", "_reshape_alias")
def _viewed(call: Call) -> Reach:
    return call.reaches[0].moved(lambda bound: _reshaped(bound, call.shape))


def _reshaped(bound: Tensor, shape: Sequence[int]) -> Tensor:
    """Leading and trailing dimensions that stay stay expanded."""
    lead = trail = 0
    least = min(bound.ndim, len(shape))
    while lead < least and bound.shape[lead] == shape[lead]:
        lead += 1
    while trail < least - lead and bound.shape[-1 - trail] == shape[-1 - trail]:
        trail += 1
    small = squeezed(bound)
    middle = bound.shape[lead : bound.ndim - trail]
    small = small.expand(*small.shape[:lead], *middle, *small.shape[bound.ndim - trail :])
    ends = small.shape[:lead], small.shape[bound.ndim - trail :]
    return small.reshape(*ends[0], *shape[lead : len(shape) - trail], *ends[1]).expand(tuple(shape))


@_rule("roll", "flip", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _moves(call: Call) -> list[Reach]:
    return call.moved()


_rule(*(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))(_moves)


@_rule("index", "index_select", "gather")
def _picked(call: Call) -> list[Reach]:
    if len(call.reaches) > 1 or known(call.args[0]) is None:
        raise NotImplementedError  # which elements are picked depends on the image
    return call.moved()


@_rule("cat", "stack")
def _joined(call: Call) -> Reach:
    tensors = call["tensors"]
    parts = [known(one) or nothing(one.shape) for one in tensors]
    some = around([known(one) and _point(known(one)) for one in tensors], ())
    dim = (call["dim"] or 0) % len(call.shape)
    bounds = []
    for same in zip(*(part.bounds for part in parts), strict=True):
        kept = [one for one in map(squeezed, same) if one.numel() or one.ndim == len(call.shape)]
        if call.name == "cat":
            size = [max(one.shape[d] for one in kept) for d in range(len(call.shape))]
            wide = [one.shape[dim] for one in same if one.ndim == len(call.shape)]
            kept = [
                one.expand([n if d == dim else s for d, s in enumerate(size)])
                for one, n in zip(kept, wide, strict=True)
            ]
        bounds.append(call.func(kept, dim).expand(call.shape))
    return replace(some, bounds=tuple(bounds))


def _point(reach: Reach | None) -> Reach | None:
    """Its step and doubts, with nothing read."""
    return None if reach is None else replace(reach, bounds=nothing(()).bounds, off=None)


@_rule("glu")
def _gated_linear(call: Call) -> Reach:
    (reach,) = call.reaches
    halves = [reach.moved(lambda one, n=n: one.chunk(2, call["dim"])[n]) for n in (0, 1)]  # type: ignore[misc]
    return around(halves, call.shape)


# -- reductions, normalisations, products -----------------------------------------------------------------------------


@_rule("mean", "sum", "prod", "max", "min", "amax", "amin", "any", "all", "argmax", "argmin", "median")
@_rule("var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp")
def _reduced(call: Call) -> Reach:
    (reach,) = call.reaches
    dims = call["dim"]
    every = list(range(len(reach.shape)))
    dims = every if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    found = together(reach, dims, gates=call.gates)
    return found.moved(lambda one: one.reshape(call.shape))


@_rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(call: Call) -> Reach:
    (reach,) = call.reaches
    left = reach.without(reach.off)
    return around([left, together(left, [call["dim"]], gates=call.gates)], call.shape).without(reach.off)


def _normalised(reach: Reach, dims: Sequence[int], call: Call) -> Reach:
    """Each element and the statistics taken over dimensions."""
    return around([reach, together(reach, dims, gates=call.gates)], reach.shape)


@_rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> list[Reach | None]:
    dims = range(-len(call["normalized_shape"]), 0)
    return [_normalised(call.reaches[0], list(dims), call)]


@_rule("native_group_norm")
def _group_norm(call: Call) -> list[Reach | None]:
    reach, groups = call.reaches[0], call["group"]
    split = (reach.shape[0], groups, reach.shape[1] // groups, *reach.shape[2:])
    parted = reach.moved(lambda one: _reshaped(one, split))
    found = _normalised(parted, list(range(2, len(split))), call)
    return [found.moved(lambda one: _reshaped(one, reach.shape))]


@_rule("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit", "batch_norm")
def _batch_norm(call: Call) -> list[Reach | None]:
    reach = call.reaches[0]
    dims = [dim for dim in range(len(reach.shape)) if dim != 1]
    return [_normalised(reach, dims, call) if call["training"] else reach]


@_rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
def _settled_batch_norm(call: Call) -> list[Reach | None]:
    return [call.reaches[0]]


@_rule("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "_addmm_activation")
def _product(call: Call) -> Reach:
    left, right = _factors(call)
    first, second = known(left), known(right)
    parts = [call.reach("self")] if call.name.startswith(("add", "_add", "baddbmm")) else []
    if first is not None:
        rows = together(first, [-1], gates=call.gates)
        parts.append(rows if right.ndim > 1 else rows.moved(lambda one: one.squeeze(-1)))
    if second is not None and first is not None and first.off is not None:
        parts.append(_weighed(first.off, second))
    elif second is not None:
        columns = together(second, [-2 if right.ndim > 1 else -1], gates=call.gates)
        parts.append(columns if right.ndim > 1 else columns.moved(lambda one: one.reshape(())))
    return around(parts, call.shape)


def _factors(call: Call) -> tuple[Tensor, Tensor]:
    given = [one for one in call.args if isinstance(one, Tensor)]
    return given[-2], given[-1]


def _weighed(off: Tensor, values: Reach) -> Reach:
    """Attention weights `[..., L, S]`, some of them off, times values `[..., S, D]`."""

    def read(bound: Tensor) -> Tensor:
        small = squeezed(bound)
        small = small.expand(*small.shape[:-2], off.shape[-1], small.shape[-1])
        return small.unsqueeze(-3).masked_fill(off.unsqueeze(-1), NOTHING).amin(-2)

    return values.changed(read)


def _attention(call: Call) -> list[Reach | None]:
    """Queries, keys and values `[..., L, d]`; all keys are read that no mask hides."""
    query, *others = (call.reach(name) for name in ("query", "key", "value"))
    off = _hidden(call)
    parts = [query and together(query, [-1], gates=call.gates)]
    for one in others:
        one = one and together(one, [-1], gates=call.gates)
        parts.append(one and (together(one, [-2], gates=call.gates) if off is None else _weighed(off, one)))
    return [around(parts, call.shape)]


def _hidden(call: Call) -> Tensor | None:
    """Where a mask given to an attention hides keys from queries, `[..., L, S]`."""
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    if known(mask) is not None:
        raise NotImplementedError
    if call["is_causal"]:
        return torch.ones(call["query"].shape[-2], call["key"].shape[-2]).triu(1).bool()
    if mask is None:
        return None
    off = ~mask if mask.dtype == torch.bool else mask <= MASKED
    return off.cpu() if off.any() else None


# -- windows over maps ------------------------------------------------------------------------------------------------


@_rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def _convolved(call: Call) -> Reach:
    weight, transposed = call["weight"], bool(call["transposed"])
    reach, groups, spatial = call.reach("input"), call["groups"], len(call.shape) - 2
    parts = [one and together(one, range(len(one.shape)), gates=call.gates) for one in (known(weight),)]
    parts = [one and one.moved(lambda bound: bound.reshape(())) for one in parts]
    if reach is not None:
        reach = _mixed(reach, groups, call.shape[1])
        sizes = [_per_dim(call[key], spatial) for key in ("stride", "padding", "dilation")]
        parts.append(_windows(reach, call.shape, weight.shape[2:], *sizes, transposed=transposed))
    return around(parts, call.shape)


def _mixed(reach: Reach, groups: int, channels: int) -> Reach:
    """Every channel of a group reads all channels of that group."""

    def mix(bound: Tensor) -> Tensor:
        small = squeezed(bound)
        if small.shape[1] > 1:
            parted = small.reshape(small.shape[0], groups, -1, *small.shape[2:])
            small = parted.amin(2).repeat_interleave(channels // groups, 1)
        return small.expand(bound.shape[0], channels, *bound.shape[2:])

    return reach.changed(mix)


def _windows(
    reach: Reach,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    transposed: bool = False,
) -> Reach:
    spatial = len(kernel)
    reach = _measured_step(reach)
    step = list(reach.step)
    for place in range(spatial):
        dim, axis = len(shape) - spatial + place, 2 - spatial + place  # the last two dimensions are down and across
        make = Taps.spreading if transposed else Taps.sliding
        taps = make(shape[dim], kernel[place], stride[place], padding[place], dilation[place])
        reach = taps.read(reach, dim, axis if axis >= 0 else None)
        if axis >= 0:
            step[axis] = step[axis] / stride[place] if transposed else step[axis] * stride[place]
    return replace(reach, step=(step[0], step[1]))


def _measured_step(reach: Reach) -> Reach:
    """With the steps that the map shows, where it has more than one position."""
    step = list(reach.step)
    for axis, dim in ((0, -2), (1, -1)):
        bound = squeezed(reach.bounds[axis])
        if len(reach.shape) > 2 and (size := bound.shape[dim]) > 1:
            slope = (bound.select(dim, size - 1) - bound.select(dim, 0)) / (size - 1)
            slope = slope[slope.isfinite()]
            step[axis] = float(slope.mean()) if slope.numel() and slope.mean() > 0 else step[axis]
    return replace(reach, step=(step[0], step[1]))


@_rule(*(f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)))
@_rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def _pooled(call: Call) -> Reach:
    (reach,) = call.reaches
    spatial = 3 if "3d" in call.name else 2 if "2d" in call.name else 1
    kernel = _per_dim(call["kernel_size"], spatial)
    stride = _per_dim(call["stride"] or kernel, spatial)
    if not call.gates and _single(call.shape, reach.shape, spatial):
        return together(reach, range(-spatial, 0), gates=False)
    sizes = _per_dim(call["padding"], spatial), _per_dim(call["dilation"] or 1, spatial)
    return _windows(reach, call.shape, kernel, stride, *sizes)


@_rule(*(f"{prefix}adaptive_{kind}_pool{n}d" for prefix in ("", "_") for kind in ("max", "avg") for n in (1, 2, 3)))
def _adaptive(call: Call) -> Reach:
    (reach,) = call.reaches
    spatial = int(call.name[-2])
    if _single(call.shape, reach.shape, spatial):
        return together(reach, range(-spatial, 0), gates=call.gates)
    return _resampled(reach, call.shape, spatial, lambda dim: Taps.adaptive(call.shape[dim], reach.shape[dim]))


def _single(after: Sequence[int], before: Sequence[int], spatial: int) -> bool:
    """Whether one position is left of several."""
    return all(n == 1 for n in after[-spatial:]) and any(n > 1 for n in before[-spatial:])


def _resized(call: Call) -> Reach:
    """Interpolation, read off the operation itself: its matrix along each dimension."""
    (reach,) = call.reaches
    spatial = len(reach.shape) - 2

    def matrix(dim: int) -> Taps:
        size = reach.shape[dim]
        one = [1] * (spatial - 1)
        unit = torch.eye(size).view(1, size, *one[: dim - 2], size, *one[dim - 2 :])
        weights = call.func(unit, *call.args[1:], **call.kwargs)[0].movedim(dim - 1, 1)  # [size, n, ...]
        return Taps.weighted(weights.flatten(2)[..., 0].T)

    return _resampled(reach, call.shape, spatial, matrix)


def _resampled(reach: Reach, shape: Sequence[int], spatial: int, taps: Callable[[int], Taps]) -> Reach:
    reach = _measured_step(reach)
    step = list(reach.step)
    for place in range(spatial):
        dim, axis = len(shape) - spatial + place, 2 - spatial + place
        before = reach.shape[dim]
        reach = taps(dim).read(reach, dim)
        if axis >= 0:
            step[axis] *= before / shape[dim]
    return replace(reach, step=(step[0], step[1]))


@_rule("constant_pad_nd")
def _padded(call: Call) -> Reach:
    """Zeros around a map are more of the image in theory, as in a convolution; along other dimensions just zeros."""
    (reach,) = call.reaches
    pad = list(call["pad"])
    for place in range(len(pad) // 2):
        dim = len(call.shape) - 1 - place
        taps = Taps.sliding(call.shape[dim], 1, 1, pad[2 * place], 1)
        axis = {0: 1, 1: 0}.get(place) if len(call.shape) > 2 else None
        if axis is None or not _regular(reach, dim, axis):
            outside = (taps.index < 0) | (taps.index >= reach.shape[dim])
            taps = Taps(taps.index, ~outside)
        reach = taps.read(reach, dim, axis)
    return reach


def _regular(reach: Reach, dim: int, axis: int) -> bool:
    """Whether positions follow each other along a dimension at one distance, as those of a map."""
    bound = squeezed(reach.bounds[axis])
    if bound.shape[dim] == 1:
        return reach.shape[dim] == 1
    steps = bound.diff(dim=dim)
    return bool((steps == steps.narrow(dim, 0, 1)).all()) and bool((steps != 0).any())


@_rule("im2col")
def _unfolded(call: Call) -> list[Reach]:
    if any(_per_dim(call["padding"], 2)):
        raise NotImplementedError
    return call.moved()


def _per_dim(value: Any, spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values or [0] * spatial
