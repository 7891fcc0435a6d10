"""Layers as Captum expects them: each running once, between tensors of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchloupe_core.query import Query
from torchloupe_core.watch import hooked

__all__ = ["functions_between", "separated", "twin"]

Noting = TypeVar("Noting", "_Outside", "_Rereading")


@contextlib.contextmanager
def separated(
    query: Query, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module] | None = None
) -> Iterator[None]:
    """Inside, every call of a module of these kinds runs a copy of its own, on tensors that nothing else uses.

    Captum keeps one state a module and changes the gradient at the tensors that enter and leave it. It goes wrong where
    a module runs several times, directly follows another one, or shares its input with a skip; and it takes a module
    that works in place for one that does not. make: builds a copy of a module; `twin` unless given.
    """
    layers, rereads = query.handle.trace(query.shape).layers, _rereads(query)
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for name, part in query.handle.module.named_modules():
            if isinstance(part, kinds) and name in layers:
                changed.append((part, type(part)))
                copies = [(make or twin)(part) for _ in range(layers[name].calls)]
                part.__dict__["calls"] = _Calls(copies, rereads and bool(getattr(part, "inplace", False)))
                part.__class__ = _Separated
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind
            part.__dict__.pop("calls", None)


@dataclass
class _Calls:
    """The copies of a module, and which is next. overwriting: what they give also takes the place of what they got."""

    copies: list[nn.Module]
    overwriting: bool
    turn: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        copy = self.copies[self.turn]
        self.turn = (self.turn + 1) % len(self.copies)
        found: Tensor = copy(x.view_as(x))
        if self.overwriting:
            written: Tensor = _Overwrite.apply(x, found)
            return written
        return found.view_as(found)


class _Separated(nn.Module):
    """What a module becomes for the time; its copies are children to Captum, but no part of the model's structure."""

    calls: _Calls

    def forward(self, x: Tensor) -> Tensor:
        return self.calls(x)

    def children(self) -> Iterator[nn.Module]:
        return iter(self.calls.copies)


class _Overwrite(torch.autograd.Function):
    """Writes one tensor over another; the gradient belongs to the writer alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.copy_(found)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[None, Tensor]:
        return None, given


def twin(part: nn.Module) -> nn.Module:
    """A module without parameters once more, without its hooks."""
    copy = type(part).__new__(type(part))
    nn.Module.__init__(copy)
    copy.__dict__.update({name: value for name, value in part.__dict__.items() if not name.startswith("_")})
    return copy.eval()


def functions_between(query: Query) -> set[str]:
    """Names of the torch functions that run outside the innermost modules."""
    layers = query.handle.trace(query.shape).layers
    innermost = [name for name in layers if not list(query.handle.module.get_submodule(name).children())]
    return _looked(query, innermost, _Outside()).names


def _rereads(query: Query) -> bool:
    """Whether the model reads, under its old name, what a module has overwritten: a skip around an in-place ReLU."""
    layers = query.handle.trace(query.shape).layers
    in_place = [name for name in layers if getattr(query.handle.module.get_submodule(name), "inplace", False)]
    functions = _looked(query, in_place, _Rereading())
    functions.overwritten.clear()
    return functions.found


def _looked(query: Query, layers: list[str], functions: Noting) -> Noting:
    """What is to be noted in a forward pass of the first image; once for a model and input shape, as its trace."""
    notes: dict[str, Any] = vars(query.handle.trace(query.shape))
    name = type(functions).__name__
    if name not in notes:
        parts = {name: query.handle.module.get_submodule(name) for name in layers}
        with query.handle.borrow(), hooked(parts, functions.enter, functions.leave), functions:
            query.handle.module(query.inputs[:1].clone())
        notes[name] = functions
    noted: Noting = notes[name]
    return noted


class _Outside(TorchFunctionMode):
    """Notes which torch functions run while no watched module does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.depth = 0

    def enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        self.depth += 1

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        self.depth -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.depth:
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


class _Rereading(TorchFunctionMode):
    """Notes whether a tensor that a watched module has overwritten is used by another name than its output."""

    enter = None

    def __init__(self) -> None:
        super().__init__()
        self.overwritten: list[Tensor] = []
        self.found = False

    def leave(self, name: str, module: nn.Module, output: Any) -> Any:
        other_name = output.view_as(output)
        self.overwritten.append(output)
        return other_name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [one for given in args for one in (given if isinstance(given, (list, tuple)) else (given,))]
        self.found = self.found or any(one is done for one in read for done in self.overwritten)
        return func(*args, **(kwargs or {}))
