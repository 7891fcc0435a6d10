"""A trained network that puts pictures into styles: what `train_stylizer` returns."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torchloupe_core import images as pictures
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.memory import require
from torchloupe_core.results import Result, writable_folder, write_whole
from torchloupe_core.spec import Spec
from torchloupe_core.stylenet import StyleNet

__all__ = ["Mix", "Stylizer", "flat", "png"]

Mix = int | str | Sequence[float] | Mapping[str, float]

WORKING = 24  # bytes a channel of full resolution takes at a pixel, while the network runs


@dataclass(frozen=True, eq=False)
class Stylizer(Result):
    """The weights of a `StyleNet`, and how it was trained.

    weights: all of them as one vector. channels, width, blocks: of the network. styles: the styles' names. losses:
    `[steps, 3]`, content, style and total variation, unweighted, each step's mean over its images; pictures: `[S, 3, h,
    w]`, the styles, small; samples: `[k, C, H, W]`, images of the data set, and made: `[S, k, C, H, W]`, these in each
    style. stopped: why training ended early, "" if it did not.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_stylizer"

    weights: Tensor
    channels: int
    width: int
    blocks: int
    styles: tuple[str, ...]
    losses: Tensor
    pictures: Tensor
    samples: Tensor
    made: Tensor
    stopped: str = ""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.styles)

    @cached_property
    def network(self) -> StyleNet:
        """The network itself, from images `[N, C, H, W]` in [0, 1] and a mix of styles `[N, S]`."""
        found = StyleNet(len(self), channels=self.channels, width=self.width, blocks=self.blocks)
        vector_to_parameters(self.weights, found.parameters())
        return found.eval().requires_grad_(False)

    def mix(self, style: Mix) -> Tensor:
        """`[S]`: what each style counts for, given by a number, a name, a weight for each or weights by name."""
        if isinstance(style, str):
            return self.mix({style: 1.0})
        if isinstance(style, Mapping):
            for name in style:
                if name not in self.styles:
                    raise UnknownName.of("style", name, self.styles)
            return self.mix([style.get(name, 0.0) for name in self.styles])
        if isinstance(style, int):
            if not 0 <= style < len(self):
                raise UnknownName(f"no style {style}; there are {len(self)}, 0 to {len(self) - 1}")
            return torch.eye(len(self))[style]
        weights = torch.tensor([float(one) for one in style])
        if len(weights) != len(self) or weights.sum() <= 0 or not weights.isfinite().all():
            raise BadInput(f"a mix of {len(self)} styles has a weight for each, above 0 in all; got {list(style)}")
        return weights / weights.sum()

    def apply(self, image: Any, style: Mix = 0, *, size: int | None = None, batch_size: int = 4) -> Tensor:
        """`[N, C, H, W]` in [0, 1]: pictures of any one size in a style, or in a mix of styles.

        image: as everywhere; a float tensor is pixels in [0, 1]. size: pixels of the longer side to scale them to.
        """
        spec = Spec(input_size=(self.channels, 1, 1))
        device, mix = torch.device("cpu"), self.mix(style)
        given = pictures.read_pixels(image, spec, device=device, dtype=torch.float32, longest=size).values
        pixels = given.shape[2] * given.shape[3]
        together = max(1, min(batch_size, 2**20 // pixels))
        require(WORKING * self.width * pixels * together, f"a picture of {given.shape[2]}x{given.shape[3]}", device)
        with torch.no_grad():
            parts = [self.network(part, mix.expand(len(part), -1)) for part in torch.split(given, together)]
        return torch.cat(parts)

    def folder(
        self,
        source: str | os.PathLike[str],
        out: str | os.PathLike[str],
        style: Mix = 0,
        *,
        size: int | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[list[Path], dict[str, str]]:
        """Writes every picture of a folder, of any size, in a style as `.png` under `out`, in the same subfolders.

        Returns where they are, and why others could not be read.
        """
        root, target = Path(source), writable_folder(out)
        files, written, failed = pictures.find(root), [], {}
        for number, path in enumerate(files, 1):
            try:
                image = self.apply(path, style, size=size)
            except BadInput as error:
                failed[str(path)] = str(error)
            else:
                place = target / path.relative_to(root)
                written.append(place.with_name(f"{path.name}.png" if path.suffix.lower() != ".png" else path.name))
                write_whole(written[-1], png(image[0]))
            report(number, len(files))
        return written, failed


def flat(network: StyleNet) -> Tensor:
    """All weights as one vector, on the CPU."""
    return parameters_to_vector(network.parameters()).detach().float().cpu().clone()


def png(image: Tensor) -> bytes:
    """An image `[C, H, W]` in [0, 1] as a file of 8 bits."""
    values = (image.detach().clamp(0, 1) * 255).round().byte().cpu()
    buffer = io.BytesIO()
    Image.fromarray(values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
