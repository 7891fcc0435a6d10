"""Watching layers during a forward pass: the one file that registers hooks.

A place in a model is named by its module, `layer4.1.conv2`. Where a module runs several times in one forward pass,
`relu#1`, `relu#2` ... are its calls and the plain name is the last of them. `fc.in` is what goes into a module.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.layout import Layout, to_map

__all__ = ["Exchange", "Place", "Watch", "first_tensor", "hooked", "on_gradient"]

Before = Callable[[str, nn.Module, Any], Any]
After = Callable[[str, nn.Module, Any], Any]
Exchange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Where in a forward pass: the module, which of its calls (None: the last), its input or its output."""

    module: str
    call: int | None = None
    entering: bool = False

    @classmethod
    def parse(cls, name: str) -> Place:
        entering = name.endswith(".in")
        name = name.removesuffix(".in") if entering else name
        module, mark, call = name.partition("#")
        return cls(module, int(call), entering) if mark and call.isdigit() else cls(name, None, entering)

    def __str__(self) -> str:
        return self.module + (f"#{self.call}" if self.call else "") + (".in" if self.entering else "")


class _Stop(BaseException):
    """Ends a forward pass after the last layer needed. A BaseException, so that no model code swallows it."""


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], before: Before | None, after: After | None) -> Iterator[None]:
    """Calls `before(name, module, arguments)` and `after(name, module, output)` as each module runs.

    What they return, unless None, takes the place of the arguments or the output. The hooks are gone on leaving, even
    when registering them was interrupted between two modules.
    """
    mine: set[int] = set()
    try:
        for name, module in modules.items():
            if before is not None:
                enter = _Entering(name, before)
                mine.add(id(enter))
                module.register_forward_pre_hook(enter, with_kwargs=True)
            if after is not None:
                leave = _Leaving(name, after)
                mine.add(id(leave))
                module.register_forward_hook(leave)
        yield
    finally:
        for module in modules.values():
            for table in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in table.items() if id(hook) in mine]:
                    del table[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def on_gradient(values: Tensor, call: Callable[[Tensor], None]) -> None:
    """Calls `call(gradient)` each time that a gradient passes through values of a graph."""
    if values.requires_grad:
        values.register_hook(call)  # type: ignore[no-untyped-call]


class _Entering:
    def __init__(self, name: str, call: Before) -> None:
        self.name, self.call = name, call

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.call(self.name, module, (args, kwargs))


class _Leaving:
    def __init__(self, name: str, call: After) -> None:
        self.name, self.call = name, call

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.call(self.name, module, output)


class Watch:
    """Runs a model and keeps what the watched places saw. Made by `Handle.watch`, used inside its `with` block.

    Calling it runs one forward pass and returns the model's output, or None if it stopped after the last place needed.
    `watch["layer4"]` is the raw tensor there, safe from in-place operations that follow; `watch.map("layer4")` is the
    same as a map `[N, C, h, w]`.
    """

    def __init__(
        self,
        module: nn.Module,
        places: Mapping[str, Place],
        calls: Mapping[str, int],
        *,
        through: bool,
        leaf: str | None,
        layouts: Mapping[str, Layout | None],
        exchange: Mapping[str, Exchange],
        unread: Collection[str],
        forward_done: Callable[[int], None],
    ) -> None:
        self._module, self._places, self._calls = module, places, calls
        self._through, self._leaf, self._layouts, self._forward_done = through, leaf, layouts, forward_done
        self._exchange, self._unread = exchange, unread
        self._seen: dict[str, Tensor] = {}
        self._seen_in: dict[str, int] = {}  # the call of its module that a place was last seen in
        self._count: dict[str, int] = {}
        self._wanted: dict[str, list[str]] = {}
        for text, place in places.items():
            self._wanted.setdefault(place.module, []).append(text)

    def __call__(self, inputs: Tensor) -> Any:
        self._seen.clear()
        self._seen_in.clear()
        self._count.clear()
        grad = torch.is_grad_enabled()
        try:
            output = self._module(inputs.clone())  # a first layer may work in place
        except _Stop:
            output = None
        finally:
            torch.set_grad_enabled(grad)  # a leaf switches it on half-way
        self._forward_done(len(inputs))
        for text, place in self._places.items():
            if text not in self._seen_in:
                raise BadInput(_never_ran(place, self._count.get(place.module, 0)))
        return output

    def __getitem__(self, name: object) -> Tensor:
        """What a watched place held, raw."""
        return self._seen[str(name)]

    def map(self, name: object) -> Tensor:
        """What a watched place held, as a canonical map `[N, C, h, w]`."""
        layout = self._layouts[str(name)]
        if layout is None:
            raise NotApplicable(f"layer {str(name)!r} gives no map of channels")
        return to_map(self[name], layout)

    def entered(self, name: str, module: nn.Module, arguments: Any) -> Any:
        """Hook: a watched module is about to run."""
        self._count[name] = self._count.get(name, 0) + 1
        return self._take(name, arguments, entering=True)

    def left(self, name: str, module: nn.Module, output: Any) -> Any:
        """Hook: a watched module has run."""
        return self._take(name, output, entering=False)

    def _take(self, name: str, value: Any, *, entering: bool) -> Any:
        call = self._count[name]
        texts = [
            text
            for text in self._wanted[name]
            if self._places[text].entering == entering and self._places[text].call in (None, call)
        ]
        if not texts:
            return None
        tensor = first_tensor(value)
        if tensor is None:
            raise NotApplicable(f"{name!r} gives no tensor but {type(value).__name__}; watch a layer inside it")
        if self._leaf in texts and self._is_meant(self._leaf, call):
            tensor = tensor.detach().requires_grad_(True)
            torch.set_grad_enabled(True)
        for text in texts:
            if text in self._exchange and self._is_meant(text, call):
                tensor = self._exchange[text](tensor)
        self._seen.update({text: tensor for text in texts if text not in self._unread})
        self._seen_in.update(dict.fromkeys(texts, call))
        if not self._through and self._complete():
            raise _Stop
        safe = all(text in self._unread for text in texts)  # nobody looks at it later
        return _replaced(value, tensor if safe else tensor.clone())

    def _is_meant(self, text: str, call: int) -> bool:
        """Whether this call is the one a place names; a plain name is the last one."""
        place = self._places[text]
        return call == (place.call or self._calls.get(place.module, 1))

    def _complete(self) -> bool:
        """Whether this was the last sight needed: every place seen, in the call it names."""
        return all(
            self._seen_in.get(text, 0) >= (place.call or self._calls.get(place.module, 1))
            for text, place in self._places.items()
        )


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, tuple, list or dict, however nested."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def _replaced(value: Any, tensor: Tensor) -> Any:
    """`value` with its first tensor exchanged; containers are copied, never written to."""
    if isinstance(value, Tensor):
        return tensor
    changed = copy.copy(list(value) if isinstance(value, tuple) else value)
    for key, part in changed.items() if isinstance(changed, dict) else enumerate(changed):
        if first_tensor(part) is not None:
            changed[key] = _replaced(part, tensor)
            break
    if isinstance(value, tuple):
        return value._make(changed) if hasattr(value, "_make") else tuple(changed)
    return changed


def _never_ran(place: Place, calls: int) -> str:
    if calls:
        return f"{place.module!r} ran {calls} times in this forward pass, so there is no {str(place)!r}"
    return f"{place.module!r} did not run in this forward pass, so it has no activation here"
