"""Feature maps of images, and where they exceed a threshold: what `activations` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.dataset import DataSet
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.results import Result
from torchloupe_core.scan import scan
from torchloupe_core.statistics import Quantiles

__all__ = ["Activations", "Threshold", "quantiles_over", "thresholds"]

Threshold = float | str | Sequence[float] | Tensor

SKETCH = 8192  # values a quantile sketch holds for each channel


@dataclass(frozen=True, eq=False)
class Activations(Result):
    """What some channels of a layer gave for some images.

    maps: `[N, C, h, w]` float32, raw. images: `[N, 3, H, W]` in [0, 1], what the model was shown. channels: the number
    of each of the C channels in the layer. thresholds: one for each channel, `[C]`; threshold: in words, what they are.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_looking"

    maps: Tensor
    images: Tensor
    layer: str
    channels: tuple[int, ...]
    thresholds: Tensor | None = None
    threshold: str = ""

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> Activations:
        """The activations of one image."""
        index = range(len(self))[index]
        return replace(self, maps=self.maps[index : index + 1], images=self.images[index : index + 1])

    def only(self, places: Sequence[int]) -> Activations:
        """The channels at these places of `channels`, as another result."""
        kept = None if self.thresholds is None else self.thresholds[list(places)]
        chosen = tuple(self.channels[place] for place in places)
        return replace(self, maps=self.maps[:, list(places)], channels=chosen, thresholds=kept)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.images.shape[2], self.images.shape[3]

    def upsample(self) -> Tensor:
        """`[N, C, H, W]`: the maps at the images' resolution, bilinearly."""
        if self.maps.shape[2:] == self.images.shape[2:]:
            return self.maps
        return F.interpolate(self.maps, self.size, mode="bilinear", align_corners=False)

    @property
    def masks(self) -> Tensor | None:
        """`[N, C, H, W]` bool: the pixels where the enlarged map exceeds its channel's threshold; None without one.

        As in Zhou 2015 and Bau 2017: enlarged first, then compared.
        """
        return None if self.thresholds is None else self.upsample() > self.thresholds[:, None, None]

    def overlay(self, channel: int | None = None, *, alpha: float = 0.6) -> Tensor:
        """`[N, 3, H, W]` in [0, 1]: each image, dark where a channel is below its threshold.

        Without a threshold the map in colour over the image. channel: its number in the layer, if there are several.
        """
        from torchloupe_core import plots_looking

        return plots_looking.overlay(self, self._place(channel), alpha=alpha)

    def _place(self, channel: int | None) -> int:
        if channel is None and len(self.channels) == 1:
            return 0
        if channel not in self.channels:
            asked = "name one" if channel is None else f"got {channel}"
            shown = ", ".join(map(str, self.channels[:8])) + (", ..." if len(self.channels) > 8 else "")
            raise BadInput(f"this result holds the channels {shown}; {asked}")
        return self.channels.index(channel)


def thresholds(maps: Tensor, threshold: Threshold, chosen: Sequence[int], count: int) -> tuple[Tensor, str]:
    """One value for each channel of `maps [N, C, h, w]`, and in words what they are.

    A number holds for all channels; a text as "99%" is that quantile of each channel over the positions of all images
    (Bau 2017 take 99.5%); a list or tensor, as a scan gives it, has one value for each of the chosen channels, or for
    all `count` of the layer.
    """
    if isinstance(threshold, str):
        share = _share(threshold)
        flat = maps.transpose(0, 1).flatten(1).numpy()  # [C, N * h * w]
        found = np.quantile(flat, share, axis=1)  # torch.quantile ends at 16 million values
        images = f"{len(maps)} image" + "s" * (len(maps) > 1)
        return torch.from_numpy(np.asarray(found, dtype=np.float32)), f"{threshold.strip()} quantile of {images}"
    values = _numbers(threshold)
    if values.ndim == 0:
        return values.expand(len(chosen)).clone(), f"{values.item():.4g}"
    if values.ndim == 1 and len(values) == count:
        return values[list(chosen)], "a value for each channel"
    if values.ndim == 1 and len(values) == len(chosen):
        return values, "a value for each channel"
    some = f"{len(chosen)} or {count}" if len(chosen) != count else str(count)
    raise BadInput(f"threshold has one value or {some}, one for each channel; got {list(values.shape)}")


def quantiles_over(
    handle: Handle, data: DataSet, layer: str, threshold: Threshold, **options: Any
) -> tuple[Tensor, str]:
    """Each channel's quantile, as `"99.5%"`, over all positions of all images of a data set, and that in words.

    One pass over the data; ranks are off by up to 1/8192. options: of `scan`.
    """
    if not isinstance(threshold, str):
        raise BadInput(f'what is taken over a data set is a quantile, as "99.5%"; got {threshold!r}')
    share, sketch = _share(threshold), Quantiles(SKETCH)
    found = scan(handle, data, {layer: [sketch]}, **options)
    return sketch.compute().quantile(share).float(), f"{threshold.strip()} quantile of {found.images} images"


def _share(text: str) -> float:
    try:
        share = float(text.strip().removesuffix("%")) / 100 if text.strip().endswith("%") else float("nan")
    except ValueError:
        share = float("nan")
    if not 0 <= share < 1:
        raise BadInput(f'threshold is a value, as 0.5, or a quantile from "0%" to below "100%", as "99%"; got {text!r}')
    return share


def _numbers(threshold: Any) -> Tensor:
    try:
        values = torch.as_tensor(threshold, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f'threshold is a value, as 0.5, or a quantile, as "99%"; got {threshold!r}') from None
    if isinstance(threshold, bool) or not values.isfinite().all():
        raise BadInput(f"threshold is a finite number; got {threshold!r}")
    return values
