"""A comparison kept in a folder, images in groups, each written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchloupe_core.errors import StoreError
from torchloupe_core.identity import differences
from torchloupe_core.results import writable_folder, write_whole

__all__ = ["Kept"]

MANIFEST = "study.json"


class Kept:
    """What is known of each group of images: tensors, and facts that JSON holds. folder: None keeps nothing.

    Raises `StoreError` for a folder that holds a study of anything else, naming what differs.
    """

    def __init__(self, folder: Path | None, made_by: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder is None:
            return
        manifest = writable_folder(folder) / MANIFEST
        asked = json.loads(json.dumps(made_by))
        if manifest.exists():
            different = differences(asked, json.loads(manifest.read_text()))
            if different:
                raise StoreError(f"{folder} holds a comparison of something else: {'; '.join(different)}")
        else:
            write_whole(manifest, json.dumps(asked, indent=1).encode())

    def group(
        self, number: int, make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was kept of a group of images, or what `make` says of it now."""
        if self.folder is None:
            return make()
        path = self.folder / f"{number:06d}.npz"
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as held:
                    facts = json.loads(str(held["facts"]))
                    return {name: torch.from_numpy(held[name]) for name in held.files if name != "facts"}, facts
            except (OSError, ValueError, KeyError, EOFError):
                path.unlink()  # torn: made again
        tensors, facts = make()
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: value.numpy() for name, value in tensors.items()}
        np.savez_compressed(buffer, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
        write_whole(path, buffer.getvalue())
        return tensors, facts
