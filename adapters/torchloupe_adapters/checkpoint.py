"""Weights from a file: safetensors, or what `torch.load` reads without running code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe_core.errors import BadInput, MissingDependency

__all__ = ["load_into", "load_state", "read", "save"]

MOST = 8


def load_into(module: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint into a model, every key of it. Raises `BadInput` and changes nothing if they do not match."""
    load_state(module, read(path), str(path))


def load_state(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """The same with a state dict, called `name` in messages."""
    expected = module.state_dict()
    state = _unwrapped(dict(weights), expected)
    problems = [
        *_listed("missing", [f"{key} {list(value.shape)}" for key, value in expected.items() if key not in state]),
        *_listed(
            "not in the model", [f"{key} {list(value.shape)}" for key, value in state.items() if key not in expected]
        ),
        *_listed(
            "of another shape",
            [
                f"{key} {list(state[key].shape)}, the model has {list(value.shape)}"
                for key, value in expected.items()
                if key in state and state[key].shape != value.shape
            ],
        ),
    ]
    if problems:
        raise BadInput(f"{name} does not fit this {type(module).__name__}:\n" + "\n".join(problems))
    module.load_state_dict(state)


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. A file that would run code when opened is refused."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no such checkpoint: {path}")
    loaded = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    for key in ("state_dict", "model", "model_state_dict", "net"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(one, Tensor) for one in loaded.values()):
        raise BadInput(f"{path} holds no state dict, a table of names and tensors, but {type(loaded).__name__}")
    return dict(loaded)


def save(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes weights as safetensors."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingDependency.of("safetensors", None) from error
    save_file(dict(weights), path)


def _safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependency.of("safetensors", None) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} is not a safetensors file: {error}") from error


def _torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # torch wonders about a foreign pickle that it refuses a moment later
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{path} is refused: it is no plain state dict, and opening it could run code. If you trust it, load it "
            "yourself and save its state_dict() as safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise BadInput(f"{path} is not a checkpoint that torch.load can read: {error}") from error


def _unwrapped(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what `DataParallel` and `torch.compile` put before every key, unless the model has it itself."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in expected):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _listed(what: str, keys: Iterable[str]) -> list[str]:
    keys = list(keys)
    shown = [f"  {what}: {key}" for key in keys[:MOST]]
    return [*shown, f"  {what}: {len(keys) - MOST} more"] if len(keys) > MOST else shown
