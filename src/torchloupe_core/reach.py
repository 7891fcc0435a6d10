"""What of the image each number inside a model reads: one forward pass that computes reaches in place of values.

Every element of every tensor carries the smallest box of pixels that holds all it depends on, as bounds: first row,
first column, and last row and last column negated. The box around two boxes is then the minimum of each bound; +inf
reads nothing, -inf reads everything. Operations that move elements (views, slices, rolls, shuffles, concatenations) are
applied to the bounds as they are; those that combine elements take minima. No tracing, so any control flow will do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "NOTHING",
    "SEEN",
    "THEORY",
    "Call",
    "Reach",
    "Reading",
    "Rule",
    "Taps",
    "around",
    "image_reach",
    "known",
    "nothing",
    "squeezed",
    "tag",
    "together",
]

NOTHING, EVERYTHING = math.inf, -math.inf
ROUNDING = 1e-6  # weights of an interpolation below this are zeros
MISSED = 0.25  # of a map by what still spans it; windows of attention miss a half or more
THEORY, SEEN = slice(0, 4), slice(4, 8)


@dataclass(frozen=True)
class Reach:
    """What each element of a tensor reads.

    bounds: eight tensors of its shape, mostly expanded ones: top, left, -bottom, -right (inclusive, in pixels) in
    theory, where padding counts as more of the image, and the same four of what is really read of this image.
    step: pixels from one position to the next, down and across, for maps that are one position wide.
    off: where a mask added to attention scores makes an element nothing. doubts: operations that are not understood.
    """

    bounds: tuple[Tensor, ...]
    step: tuple[float, float] = (1.0, 1.0)
    off: Tensor | None = None
    doubts: frozenset[str] = field(default=frozenset())

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return self.bounds[0].shape

    def moved(self, move: Callable[[Tensor], Tensor]) -> Reach:
        """After an operation that only moves elements."""
        off = None if self.off is None else move(self.off)
        return replace(self, bounds=tuple(map(move, self.bounds)), off=off)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Reach:
        """With each bound changed; no element is off any more."""
        return replace(self, bounds=tuple(map(change, self.bounds)), off=None)

    def expanded(self, shape: Sequence[int]) -> Reach:
        """Broadcast to a shape."""
        return self.moved(lambda one: one.expand(tuple(shape)))

    def without(self, off: Tensor | None) -> Reach:
        """With nothing read where `off`."""
        return self if off is None else replace(self.changed(lambda one: one.masked_fill(off, NOTHING)), off=off)

    def compact(self) -> Reach:
        """The same in little memory: expanded wherever a bound is constant."""
        return replace(self, bounds=tuple(_narrowed(one).expand(one.shape) for one in self.bounds))


def image_reach(shape: Sequence[int]) -> Reach:
    """Of a batch of images `[N, C, H, W]`: each pixel reads itself."""
    rows, columns = torch.arange(shape[-2], dtype=torch.float32)[:, None], torch.arange(shape[-1], dtype=torch.float32)
    return Reach(tuple(one.expand(tuple(shape)) for one in (rows, columns, -rows, -columns)) * 2)


def nothing(shape: Sequence[int]) -> Reach:
    """Of a constant."""
    return Reach((torch.tensor(NOTHING).expand(tuple(shape)),) * 8)


def known(tensor: object) -> Reach | None:
    """What a tensor reads of the image; None if it is a constant or no tensor."""
    return getattr(tensor, "_torchloupe_reach", None) if isinstance(tensor, Tensor) else None


# -- the algebra ------------------------------------------------------------------------------------------------------


def squeezed(bound: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor: every expanded dimension is 1."""
    for dim, (size, stride) in enumerate(zip(bound.shape, bound.stride(), strict=True)):
        if stride == 0 and size > 1:
            bound = bound.narrow(dim, 0, 1)
    return bound


def around(reaches: Iterable[Reach | None], shape: Sequence[int]) -> Reach:
    """The boxes around those of several tensors, broadcast to a shape."""
    parts = [one for one in reaches if one is not None]
    bounds = tuple(
        functools.reduce(torch.minimum, map(squeezed, same)).expand(tuple(shape))
        for same in zip(*(part.bounds for part in parts), strict=True)
    )
    step = max((part.step for part in parts), key=sum)
    return Reach(bounds, step, doubts=frozenset().union(*(part.doubts for part in parts)))


def lowest(bound: Tensor, dims: Sequence[int]) -> Tensor:
    """The minimum over dimensions, which become 1."""
    small = squeezed(bound)
    dims = [dim % bound.ndim for dim in dims]
    wide = [dim for dim in dims if small.shape[dim] > 1]
    shape = [1 if dim in dims else size for dim, size in enumerate(bound.shape)]
    return (small.amin(wide, keepdim=True) if wide else small).expand(shape)


def together(reach: Reach, dims: Sequence[int], *, gates: bool) -> Reach:
    """What a reduction over dimensions reads, keeping them as 1.

    One that reads the whole map reads the whole image. Without `gates` it counts as a constant, and so does one that
    spans most of the map, as attention over a coarse grid of positions.
    """
    found = reach.changed(lambda one: lowest(one, dims))
    whole = _whole_map(reach, dims, 0 if gates else MISSED)
    if whole is None or not whole.any():
        return found
    value = EVERYTHING if gates else NOTHING
    changed = [squeezed(one).masked_fill(whole, value).expand(one.shape) for one in found.bounds]
    return replace(found, bounds=tuple(changed) if not gates else (*changed[THEORY], *found.bounds[SEEN]))


def _whole_map(reach: Reach, dims: Sequence[int], missed: float) -> Tensor | None:
    """Where a reduction covers a map but for half a step or a share `missed` of its extent; None if nowhere.

    Either all that any element reads, or from the first position to the last by the centres of what they read: in a
    concatenation channels of different fields share a position, and some read less than others.
    """
    found: Tensor | None = None
    for axis, step in enumerate(reach.step):
        first, last = (squeezed(reach.bounds[place]) for place in (axis, axis + 2))
        centres = (first - last) / 2
        finite = centres.isfinite()
        low, high = centres.masked_fill(~finite, NOTHING), centres.masked_fill(~finite, EVERYTHING)
        extent = high.max() - low.min()
        if not extent > step / 2:
            continue  # one position wide
        slack = torch.clamp(extent * missed, min=step / 2)
        covered = high.amax(list(dims), keepdim=True) - low.amin(list(dims), keepdim=True) >= extent - slack
        ends = [lowest(one, dims) <= one.min() + slack for one in (first, last)]
        covered = covered | (ends[0] & ends[1])
        found = covered if found is None else found & covered
    return found


@dataclass(frozen=True)
class Taps:
    """Which positions along one dimension each new position reads: `index [n, k]`, counted where `valid [n, k]`."""

    index: Tensor
    valid: Tensor

    @classmethod
    def sliding(cls, n: int, kernel: int, stride: int, padding: int, dilation: int) -> Taps:
        """Of a convolution or pooling."""
        index = torch.arange(n)[:, None] * stride - padding + torch.arange(kernel) * dilation
        return cls(index, torch.ones_like(index, dtype=torch.bool))

    @classmethod
    def spreading(cls, n: int, kernel: int, stride: int, padding: int, dilation: int) -> Taps:
        """Of a transposed convolution."""
        index = torch.arange(n)[:, None] + padding - torch.arange(kernel) * dilation
        return cls(index.div(stride, rounding_mode="floor"), index % stride == 0)

    @classmethod
    def adaptive(cls, n: int, size: int) -> Taps:
        """Of adaptive pooling from `size` positions to n."""
        position = torch.arange(n)[:, None]
        first, last = position * size // n, -(-(position + 1) * size // n)
        index = first + torch.arange(int((last - first).max()))
        return cls(index, index < last)

    @classmethod
    def weighted(cls, weights: Tensor) -> Taps:
        """Of a matrix `[n, size]` of weights."""
        return cls(torch.arange(weights.shape[1]).expand(weights.shape), weights.abs() > ROUNDING)

    def read(self, reach: Reach, dim: int, axis: int | None = None) -> Reach:
        """Along one dimension of a tensor. axis: which step of the image it is, if it has one position only."""
        bounds = [self._read(one, dim, None) for one in reach.bounds[SEEN]]
        for place, bound in enumerate(reach.bounds[THEORY]):
            step = 0.0 if axis is None or place % 2 != axis else reach.step[axis] * (1 if place < 2 else -1)
            bounds.insert(place, self._read(bound, dim, step))
        return replace(reach, bounds=tuple(bounds), off=None)

    def _read(self, bound: Tensor, dim: int, step: float | None) -> Tensor:
        """Beyond the border there is nothing, or with a step the map goes on as it does inside."""
        size, small = bound.shape[dim], squeezed(bound)
        shape = [len(self.index) if one == dim else n for one, n in enumerate(bound.shape)]
        inside = self.index.clamp(0, size - 1)
        valid = self.valid & (inside == self.index) if step is None else self.valid
        constant = small.shape[dim] == 1 and (size > 1 or not step)
        if constant and bool(valid.any(1).all()):
            return small.expand(shape)
        values = small.index_select(dim, inside.flatten().clamp(max=small.shape[dim] - 1))
        values = values.view(*small.shape[:dim], *self.index.shape, *small.shape[dim + 1 :])
        along = (*self.index.shape, *[1] * (bound.ndim - 1 - dim))
        if step is not None and not torch.equal(inside, self.index):
            slope = _slope(small, dim, step if size == 1 else 0.0)
            values = values + (self.index - inside).view(along) * slope.unsqueeze(dim)
        found: Tensor = values.masked_fill(~valid.view(along), NOTHING).amin(dim + 1)
        return found.expand(shape)


def _slope(bound: Tensor, dim: int, step: float) -> Tensor:
    """How a bound grows along a dimension, on average; `step` if that cannot be seen."""
    size = bound.shape[dim]
    if size == 1:
        return torch.full_like(bound, step)
    slope = (bound.narrow(dim, size - 1, 1) - bound.narrow(dim, 0, 1)) / (size - 1)
    return slope.nan_to_num(0, 0, 0)  # a difference of infinities


def _narrowed(bound: Tensor) -> Tensor:
    small = bound = squeezed(bound)
    for dim, size in enumerate(bound.shape):
        first = small.narrow(dim, 0, 1)
        if size > 1 and bool((small == first).all()):
            small = first
    return small if small is bound else small.clone()  # and lets go of the rest


# -- the pass ---------------------------------------------------------------------------------------------------------


class Call:
    """One operation of the forward pass, as a rule sees it."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, *, gates: bool) -> None:
        self.func, self.args, self.kwargs, self.gates = func, args, kwargs, gates
        self.name = str(func._schema.name).partition("::")[2]
        self.outs = [one for one in tree_leaves(out) if isinstance(one, Tensor)]

    def __getitem__(self, name: str) -> Any:
        """An argument by its name in the operation's schema."""
        for place, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                given = self.args[place : place + 1]
                return given[0] if given else self.kwargs.get(name, argument.default_value)
        return None

    @property
    def shape(self) -> torch.Size:
        """Of the first output."""
        return self.outs[0].shape

    @property
    def reaches(self) -> list[Reach]:
        """Of every tensor given that reads the image."""
        return [one for given in tree_leaves((self.args, self.kwargs)) if (one := known(given)) is not None]

    def reach(self, name: str) -> Reach | None:
        """Of an argument; None if it is a constant."""
        return known(self[name])

    def moved(self) -> list[Reach]:
        """The operation itself applied to the bounds of its first argument."""
        reach = known(self.args[0])
        if reach is None:
            raise NotImplementedError
        rest, kwargs = tree_map_only(Tensor, Tensor.cpu, (self.args[1:], self.kwargs))
        bounds = [tree_leaves(self.func(one, *rest, **kwargs)) for one in reach.bounds]
        offs = [] if reach.off is None else tree_leaves(self.func(reach.off, *rest, **kwargs))
        found = [replace(reach, bounds=same, off=None) for same in zip(*bounds, strict=True)]
        return found if reach.off is None else [replace(one, off=off) for one, off in zip(found, offs, strict=True)]


Rule = Callable[[Call], "Reach | Sequence[Reach | None]"]


class Reading(TorchDispatchMode):
    """Inside, every operation that reads the image says what its result reads.

    Without `values` such results are tensors without numbers, on the meta device, and cost nothing; whatever does not
    depend on the image is computed as ever, at `home`. gates: whether what reads the whole map at once counts.
    """

    def __init__(self, rule: Callable[[Call], Rule | None], home: torch.device, *, gates: bool, values: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rule, self._home, self._gates, self._values = rule, home, gates, values
        self._written: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch loads its whole compiler, for seconds

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for tensor in self._written:
            del tensor._torchloupe_reach  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        name = func._schema.name.partition("::")[2]
        if name.startswith("new_") or name.endswith("_like"):  # of the image the shape only
            args = tree_map_only(Tensor, lambda one: torch.empty_like(one, device=self._place(one)), args)
            return func(*args, **self._at_home(kwargs))
        if not any(known(one) for one in tensors):
            return func(*args, **self._at_home(kwargs))
        out = self._run(func, args, kwargs)
        call = Call(func, args, kwargs, out, gates=self._gates)
        if not call.outs:
            return out
        if out is args[0]:
            self._write(args[0], self._reaches(call)[0])
            return out
        for tensor, reach in zip(call.outs, self._reaches(call), strict=False):
            if reach is not None:
                tag(tensor, reach)
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._values:
            return func(*args, **kwargs)
        if func._schema.name.endswith("_") and not args[0].is_meta:
            return args[0]  # a constant until now: its numbers do not matter any more
        if "device" in kwargs:
            kwargs = {**kwargs, "device": None if kwargs["device"] is None else torch.device("meta")}
        args, kwargs = tree_map_only(Tensor, lambda one: one if one.is_meta else one.to("meta"), (args, kwargs))
        return func(*args, **kwargs)

    def _reaches(self, call: Call) -> Sequence[Reach | None]:
        rule = self._rule(call) or unknown
        try:
            found = rule(call)
        except Exception:  # a form of the operation that its rule does not know: in doubt, and said so
            found = unknown(call)
        if isinstance(found, Reach):
            return [found if any(found is one for one in call.reaches) else found.compact()] * len(call.outs)
        return [one and one.compact() for one in found]

    def _place(self, tensor: Tensor) -> torch.device:
        return self._home if tensor.is_meta else tensor.device

    def _at_home(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`device=x.device` of an image without numbers means where the model is."""
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            return {**kwargs, "device": self._home}
        return kwargs

    def _write(self, tensor: Tensor, reach: Reach | None) -> None:
        """An operation in place: on a view, what it is a view of changes too."""
        if reach is None:
            return
        if (base := tensor._base) is not None:
            before = known(base) or nothing(base.shape)
            bounds = []
            for whole, part in zip(before.bounds, reach.bounds, strict=True):
                memory = torch.empty_strided(base.shape, base.stride(), dtype=whole.dtype)
                memory.copy_(whole)
                place = tensor.storage_offset() - base.storage_offset()
                memory.as_strided(tensor.shape, tensor.stride(), place).copy_(part)
                bounds.append(memory)
            self._retag(base, Reach(tuple(bounds), reach.step, doubts=before.doubts | reach.doubts))
        self._retag(tensor, reach)

    def _retag(self, tensor: Tensor, reach: Reach) -> None:
        if known(tensor) is None:
            self._written.append(tensor)  # perhaps a buffer of the model
        tag(tensor, reach)


def tag(tensor: Tensor, reach: Reach) -> None:
    """Notes on a tensor what it reads."""
    tensor._torchloupe_reach = reach  # type: ignore[attr-defined]


def unknown(call: Call) -> list[Reach]:
    """Of an operation not understood: at most all that its inputs read, in doubt."""
    found = []
    for out in call.outs:
        parts = [one.changed(lambda bound: bound.min()) for one in call.reaches]
        everything = around(parts, out.shape)
        found.append(replace(everything, doubts=everything.doubts | {call.name}))
    return found
