"""What a model, its inputs and the process around it look like at one moment, to see what a question left behind.

Kept apart from `borrow`, which puts things back: a guard is not checked with its own eyes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as globals_of_modules

__all__ = ["Snapshot"]

CONTAINERS = (dict, list, set)


@dataclass(frozen=True)
class Seen:
    """One thing as it was: the object itself, and what identifies its state."""

    thing: Any
    state: Any


class Snapshot:
    """Every module attribute, hook, parameter, gradient and buffer; the inputs; randomness and modes of the process."""

    def __init__(self, module: nn.Module, inputs: Tensor | None = None) -> None:
        self._module, self._inputs = module, inputs
        self._before = dict(self._look())

    def differences(self) -> list[str]:
        """What is not as it was, in words."""
        now = dict(self._look())
        found = [f"{name} is new" for name in now if name not in self._before]
        for name, seen in self._before.items():
            if name not in now:
                found.append(f"{name} is gone")
            elif now[name].thing is not seen.thing:
                found.append(f"{name} is another object")
            elif not _same(now[name].state, seen.state):
                found.append(f"{name} changed" + _in_words(seen.state, now[name].state))
        return found

    def _look(self) -> Iterator[tuple[str, Seen]]:
        for name, part in self._module.named_modules():
            yield from _attributes(f"module {name or '(root)'!r}", part)
        for name, parameter in self._module.named_parameters():
            yield from _tensor(f"parameter {name!r}", parameter)
        for name, buffer in self._module.named_buffers():
            yield from _tensor(f"buffer {name!r}", buffer)
        if self._inputs is not None:
            yield from _tensor("the caller's input", self._inputs)
            if not self._inputs.is_inference():
                yield "the version of the caller's input", Seen(None, self._inputs._version)
        yield from _process()


def _attributes(place: str, module: nn.Module) -> Iterator[tuple[str, Seen]]:
    """A module's attributes, hook tables among them, and what containers hold."""
    yield f"the class of {place}", Seen(type(module), None)
    for name, value in module.__dict__.items():
        what = f"{name.strip('_').replace('_', ' ')}, a hook table, of {place}" if _holds_hooks(name) else None
        plain = isinstance(value, (bool, int, float, str))
        yield what or f"attribute {name!r} of {place}", Seen(None if plain else value, _contents(value))


def _holds_hooks(name: str) -> bool:
    return name.startswith("_") and name.endswith("_hooks")


def _contents(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [id(item) for item in value]
    if isinstance(value, set):
        return sorted(map(str, value))
    return value if isinstance(value, (bool, int, float, str)) else None


def _tensor(place: str, tensor: Tensor) -> Iterator[tuple[str, Seen]]:
    yield place, Seen(tensor, tensor.detach().clone())
    yield f"requires_grad of {place}", Seen(None, tensor.requires_grad)
    yield f"hooks on {place}", Seen(None, len(tensor._backward_hooks or ()))
    if tensor.is_leaf:
        gradient = tensor.grad
        yield f".grad of {place}", Seen(gradient, None if gradient is None else gradient.detach().clone())


def _process() -> Iterator[tuple[str, Seen]]:
    """Random states, autograd modes, backend flags and hooks for all modules."""
    yield "torch's random state", Seen(None, torch.get_rng_state())
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield "CUDA's random state", Seen(None, torch.stack(torch.cuda.get_rng_state_all()))
    yield "numpy's random state", Seen(None, str(np.random.get_state(legacy=False)))
    yield "Python's random state", Seen(None, random.getstate())
    yield "grad mode", Seen(None, torch.is_grad_enabled())
    yield "inference mode", Seen(None, torch.is_inference_mode_enabled())
    yield "autocast", Seen(None, torch.is_autocast_enabled())
    yield "the default dtype", Seen(None, str(torch.get_default_dtype()))
    yield "deterministic algorithms", Seen(None, torch.are_deterministic_algorithms_enabled())
    yield "the number of threads", Seen(None, torch.get_num_threads())
    cudnn = torch.backends.cudnn
    yield "cudnn's flags", Seen(None, (cudnn.enabled, cudnn.benchmark, cudnn.deterministic))
    for name, table in vars(globals_of_modules).items():
        if name.startswith("_global_") and isinstance(table, dict):
            yield f"{name.strip('_').replace('_', ' ')} of all modules", Seen(None, len(table))


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return now.shape == before.shape and now.dtype == before.dtype and _equal(now, before)
    return bool(now == before)


def _equal(now: Tensor, before: Tensor) -> bool:
    if now.is_floating_point():
        return torch.equal(now.nan_to_num(nan=0.125), before.nan_to_num(nan=0.125))
    return torch.equal(now, before)


def _in_words(before: Any, now: Any) -> str:
    plain = (bool, int, float, str)
    if isinstance(before, plain) and isinstance(now, plain):
        return f" from {before!r} to {now!r}"
    if isinstance(before, list) and isinstance(now, list) and len(before) != len(now):
        return f": it held {len(before)} entries and holds {len(now)}"
    return ""
