"""A model borrowed for a question and given back exactly as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["borrowed", "kept_randomness", "kept_threads"]


@contextlib.contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Inside: the model is in eval mode, frozen and uncompiled, gradients are off and may be switched on.

    Afterwards, on success, exception and Ctrl-C alike: hooks, train flags, every other module attribute,
    `requires_grad`, `.grad`, buffers and the random state of torch, numpy and Python are what they were.
    """
    with contextlib.ExitStack() as given_back:
        given_back.enter_context(kept_randomness())
        for part in module.modules():
            given_back.callback(_module_keeper(part))
        # Tensors made in inference mode cannot be changed outside it, so there is nothing to keep.
        parameters = [parameter for parameter in module.parameters() if not parameter.is_inference()]
        for parameter in parameters:
            given_back.callback(_parameter_keeper(parameter))
        for buffer in module.buffers():
            if not buffer.is_inference():
                given_back.callback(_buffer_keeper(buffer))
        for part in module.modules():
            part.training = False  # not .eval(): a user's own train() may do more
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            if parameter.grad is not None:
                parameter.grad = None  # so that a backward() of someone else's does not add to the user's own
        given_back.enter_context(torch.inference_mode(False))
        given_back.enter_context(torch.no_grad())
        given_back.enter_context(_uncompiled(module))
        _make_differentiable(module)
        yield


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """The global random state of torch (and its accelerators in use), numpy and Python, put back on leaving."""
    state, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextlib.contextmanager
def kept_threads(count: int | None = None) -> Iterator[None]:
    """Inside, torch computes in so many threads if a count is given; afterwards in as many as before.

    Sums that are split among threads otherwise round otherwise. Libraries on numba change the number for the process.
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _module_keeper(module: nn.Module) -> Callable[[], None]:
    """Puts back a module's attributes and what its dicts, lists and sets hold: hooks, children, a model's own notes."""
    attributes = dict(module.__dict__)
    tables = [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]
    lists = [(value, list(value)) for value in attributes.values() if isinstance(value, list)]
    sets = [(value, set(value)) for value in attributes.values() if isinstance(value, set)]

    def put_back() -> None:
        for table, contents in tables:
            if not _same(table, contents):
                table.clear()
                table.update(contents)
        for sequence, items in lists:
            if len(sequence) != len(items) or any(a is not b for a, b in zip(sequence, items, strict=True)):
                sequence[:] = items
        for group, members in sets:
            if group != members:
                group.clear()
                group.update(members)
        if not _same(module.__dict__, attributes):
            module.__dict__.clear()
            module.__dict__.update(attributes)

    return put_back


def _parameter_keeper(parameter: nn.Parameter) -> Callable[[], None]:
    required, gradient = parameter.requires_grad, parameter.grad

    def put_back() -> None:
        if parameter.requires_grad != required:
            parameter.requires_grad_(required)
        if parameter.grad is not gradient:
            parameter.grad = gradient

    return put_back


def _buffer_keeper(buffer: Tensor) -> Callable[[], None]:
    value = buffer.detach().clone()

    def put_back() -> None:
        if not torch.equal(buffer, value):  # its version says nothing: batch normalisation does not count its updates
            with torch.no_grad():
                buffer.copy_(value)

    return put_back


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Whether two tables hold the same objects in the same order; no `==`, which tensors answer elementwise."""
    return len(now) == len(before) and all(
        key is other and value is kept for (key, value), (other, kept) in zip(now.items(), before.items(), strict=True)
    )


def _make_differentiable(module: nn.Module) -> None:
    """Exchanges parameters and buffers made in inference mode, which no graph may hold, for ordinary copies."""
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.is_inference():
                    table[name] = tensor.clone()


def _uncompiled(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Runs modules compiled by `torch.compile` or `.compile()` as plain Python, so that their parts can be watched."""
    compiled = any(
        type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
    if not compiled:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
