"""What a source states about a model: input size, preprocessing, display range, class names, facts about its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from torchloupe_core.layout import Layout

__all__ = ["OutputSelector", "Preprocess", "Spec", "resize_and_normalise"]

Preprocess = Callable[[Image], Tensor]
OutputSelector = str | int | Callable[[Any], Any]


@dataclass(frozen=True)
class Spec:
    """Facts about one model that its weights do not show.

    input_size: (C, H, W) of one model input, if known. fixed_size: whether other sizes fail.
    preprocess: a picture to one model input `[C, H, W]`. preprocess_text: the same in words, for people.
    mean, std: what preprocessing subtracts and divides by, in [0, 1] units, one value a channel; they turn an input
    back into a picture. classes: a name for each output. prefix: class and register tokens before the patch grid.
    classifier: the module that turns the embedding into logits. layouts: layers whose layout is stated, not inferred;
    None says that a layer gives no map of the image. output: which tensor of a tuple, list or dict output holds the
    logits: an index, a key or a function. features: the layer to look at where neither user nor target name one, for
    models whose last spatial layer does not serve.
    """

    name: str = "model"
    source: str = "module"
    input_size: tuple[int, int, int] | None = None
    fixed_size: bool = False
    preprocess: Preprocess | None = None
    preprocess_text: str = ""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    prefix: int | None = None
    classifier: str | None = None
    layouts: Mapping[str, Layout | None] = field(default_factory=dict)
    output: OutputSelector | None = None
    features: str | None = None

    @property
    def channels(self) -> int | None:
        """Channels of one input, if known."""
        return self.input_size[0] if self.input_size else None

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels `[N, C, H, W]` in [0, 1] as model inputs; as they are where mean and spread are unknown."""
        if self.mean is None or self.std is None:
            return pixels
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def pixels(self, inputs: Tensor) -> Tensor:
        """Model inputs `[N, C, H, W]` as pixels in [0, 1], all channels: `normalised` undone, the rest cut off."""
        if self.mean is None or self.std is None:
            return inputs.clamp(0, 1)
        mean, std = (inputs.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1)

    def display(self, inputs: Tensor) -> Tensor:
        """Model inputs `[N, C, H, W]` as pictures `[N, 3, H, W]` in [0, 1] on the CPU.

        Without a known mean and standard deviation each picture is stretched to its own range.
        """
        pictures = inputs.detach().to("cpu", torch.float32)
        if self.mean is not None and self.std is not None:
            pictures = pictures * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]
        elif pictures.amin() < 0 or pictures.amax() > 1:
            low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
            pictures = (pictures - low) / (high - low).clamp(min=1e-12)
        if pictures.shape[1] != 3:
            pictures = pictures[:, :1] if pictures.shape[1] < 3 else pictures[:, :3]
        return pictures.expand(-1, 3, -1, -1).clamp(0, 1)


def resize_and_normalise(
    size: tuple[int, int, int], mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
) -> Preprocess:
    """The preprocessing of a model that comes without one: resize to (H, W), scale to [0, 1], normalise if told how."""
    channels, height, width = size

    def preprocess(image: Image) -> Tensor:
        picture = image.convert("L" if channels == 1 else "RGB").resize((width, height), Resampling.BILINEAR)
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        tensor = values.view(height, width, -1).permute(2, 0, 1).float() / 255
        if mean is not None and std is not None:
            tensor = (tensor - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        return tensor

    return preprocess
