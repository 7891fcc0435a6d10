"""How much the model sees an image as it sees another: the cosine of their embeddings."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.atoms import Atom, Reduce, Seen, Subject, number, quoted
from torchloupe_core.errors import BadInput, BadTarget, NotApplicable

__all__ = ["Picture", "Similarity", "as_reference"]


@dataclass(frozen=True)
class Picture:
    """An image held in memory, known by the digest of its pixels."""

    digest: str
    image: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, image: Image.Image | np.ndarray[Any, Any] | Tensor) -> Picture:
        """A copy, so that what becomes of the image later does not change the target."""
        if isinstance(image, Tensor):
            kept: Any = image.detach().clone()
            pixels = kept.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        elif isinstance(image, Image.Image):
            kept, pixels = image.copy(), image.tobytes()
        else:
            kept, pixels = image.copy(), image.tobytes()
        facts = f"{type(image).__name__} {getattr(image, 'dtype', '')} {getattr(image, 'shape', '')}"
        return cls(hashlib.sha256(facts.encode() + pixels).hexdigest()[:12], kept)

    def __str__(self) -> str:
        return f"image#{self.digest}"


@dataclass(frozen=True)
class Similarity(Atom):
    """The cosine of each image's embedding with that of a reference; once bound the reference is its embedding.

    reference: an embedding `[D]`, the path of an image, or an image in memory. layer: where the embedding is read, its
    map averaged over positions; None is the model's output.
    """

    reference: tuple[float, ...] | str | Picture
    layer: str | None = None

    def __str__(self) -> str:
        text = str(self.reference)
        if isinstance(self.reference, tuple):
            text = "[" + ",".join(map(number, self.reference)) + "]"
        elif isinstance(self.reference, str):
            text = quoted(self.reference, always=True)
        return f"similarity:{text}" + ("" if self.layer is None else f"@{quoted(self.layer)}")

    @property
    def layers(self) -> tuple[str, ...]:
        return () if self.layer is None else (self.layer,)

    @property
    def reads_output(self) -> bool:
        return self.layer is None

    def bound(self, model: Subject) -> Similarity:
        size = model.outputs
        if self.layer is not None:
            found = model.layer(self.layer)
            if found.layout is None:
                raise NotApplicable(f"layer {self.layer!r} ({found.kind}) gives no map of channels to compare")
            size = found.layout.channels
        vector = self.reference
        if not isinstance(vector, tuple):
            image = vector.image if isinstance(vector, Picture) else vector
            vector = tuple(model.embed(image, self.layer).double().tolist())
        if size is not None and len(vector) != size:
            raise BadTarget(f"the reference embedding has {len(vector)} numbers; the model's has {size}")
        if not any(vector):
            raise BadInput("the reference embedding is zero everywhere, so nothing is similar to it")
        return replace(self, reference=vector)

    def read(self, seen: Seen, reduce: Reduce) -> Tensor:
        embedding = seen.embedding(self.layer)  # [N, D]
        vector = torch.tensor(self.reference, dtype=embedding.dtype, device=embedding.device)
        return F.cosine_similarity(embedding, vector[None])


def as_reference(reference: Any) -> tuple[float, ...] | str | Picture:
    """A reference from an embedding `[D]` or `[1, D]`, a path, or an image in memory."""
    if isinstance(reference, (str, os.PathLike)):
        return os.fspath(reference)
    if isinstance(reference, (list, tuple)):
        reference = _row(reference)
    if isinstance(reference, (Tensor, np.ndarray)) and (reference.ndim < 2 or tuple(reference.shape[:-1]) == (1,)):
        values = torch.as_tensor(reference).detach().double().cpu().flatten()
        if not len(values) or not values.isfinite().all():
            raise BadInput("a reference embedding is a row of finite numbers")
        return tuple(values.tolist())
    if isinstance(reference, (Image.Image, np.ndarray, Tensor)):
        return Picture.of(reference)
    raise BadInput(
        f"a reference is an image (a path, a PIL image, a uint8 array or a tensor) or an embedding [D]; got "
        f"{type(reference).__name__}"
    )


def _row(numbers: Any) -> Tensor:
    try:
        return torch.tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput("a reference is one image or one embedding, a row of numbers; got a list") from None
