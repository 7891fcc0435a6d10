"""The style of an image: how often channels of a layer occur together, wherever they do (Gatys et al. 2015, 2016).

A Gram matrix of features F `[C, h, w]` is `G_ij = sum_p F_ip F_jp / (C h w)`; it knows nothing of places, nor of the
image's size. The distance of two is relative, `|G - G0|^2 / |G0|^2`, other than in the papers, so that weights mean the
same for every network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle, Reading, Shape
from torchloupe_core.terms import Term

__all__ = ["Grams", "Style", "apart", "gram", "grams_of", "layers_for", "mixed_grams", "stages"]

Grams = Mapping[str, Tensor]  # of each layer, [n, C, C]

POOLED = ("AdaptiveAvgPool2d", "Flatten")
FEWEST = 4  # positions of a map whose Gram matrix says something
MOST = 4  # stages that style is read from
TINY = 1e-20


@dataclass(frozen=True)
class Style(Term):
    """The relative squared distance of Gram matrices from given ones, the mean over the layers.

    grams: `[1, C, C]` of each layer for all images, or `[n, C, C]` for each.
    """

    grams: Grams = field(default_factory=dict, repr=False)

    def penalty(self, reading: Reading, reference: Mapping[str, Tensor]) -> Tensor:
        shares = [apart(gram(reading.map(layer)), self.grams[layer]) for layer in self.layers]
        return self.weight * torch.stack(shares).mean(0)

    def only(self, start: int, stop: int) -> Style:
        """Of some of the images."""
        cut = {name: each if len(each) == 1 else each[start:stop] for name, each in self.grams.items()}
        return replace(self, grams=cut)


def gram(maps: Tensor) -> Tensor:
    """`[n, C, C]`: the Gram matrices of maps `[n, C, h, w]`."""
    found: Tensor = _Gram.apply(maps.flatten(2) / (maps[0].numel() ** 0.5))
    return found


class _Gram(torch.autograd.Function):
    """`F F^T`, with one product on the way back where two factors would take one each."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        return flat @ flat.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        (flat,) = ctx.saved_tensors
        back: Tensor = (given + given.transpose(1, 2)) @ flat
        return back


def apart(grams: Tensor, given: Tensor) -> Tensor:
    """`[n]`: the squared distance of Gram matrices `[n, C, C]` from given ones, relative to these."""
    given = given.to(grams)
    return (grams - given).square().sum((1, 2)) / given.square().sum((1, 2)).clamp(min=TINY)


def grams_of(handle: Handle, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """The Gram matrices of images `[n, C, H, W]` in [0, 1], one image after the other."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with handle.watch(*layers, shape=(images.shape[1], images.shape[2], images.shape[3])) as watch:
        for image in images:
            watch(handle.spec.normalised(image[None]).to(handle.dtype))
            for name in layers:
                found[name].append(gram(watch.map(name).to(images.dtype)))
    return {name: torch.cat(each) for name, each in found.items()}


def mixed_grams(several: Sequence[Grams], weights: Sequence[float]) -> dict[str, Tensor]:
    """Their weighted mean, whose distance has the gradient of the weighted mean of distances."""
    return {name: sum(w * each[name] for w, each in zip(weights, several, strict=True)) for name in several[0]}  # type: ignore[misc]


def stages(handle: Handle, shape: Shape) -> list[str]:
    """The last layer of each resolution that the output depends on, the finest first.

    In a VGG network relu1_2, relu2_2, relu3_3 ..., which Johnson et al. 2016 read, in a ResNet its stages.
    """
    trace, found = handle.trace(shape), {}
    for layer in trace.layers.values():
        if layer.spatial and layer.kind not in POOLED and not layer.in_attention and not layer.passes:
            found[layer.size] = layer
    kept = [one for one in found.values() if one.size is not None and one.size[0] * one.size[1] >= FEWEST]
    return [one.name for one in sorted(kept, key=lambda one: one.ends)]


def layers_for(
    handle: Handle, shape: Shape, style: Sequence[object] | None, content: object | None
) -> tuple[tuple[str, ...], str]:
    """The layers that style is read from and the one of the content, checked; those of `stages` unless given.

    Style: all but the last, where the class is decided, and four at most. Content: the one in the middle.
    """
    default = stages(handle, shape) if style is None or content is None else []
    if not default and (style is None or content is None):
        raise NotApplicable("this model has no layer with a map of several positions, so no style; name layers=")
    names = tuple(default[: max(1, min(MOST, len(default) - 1))]) if style is None else tuple(map(str, style))
    if not names:
        raise BadInput("no layer was given to read the style from")
    middle = default[len(default) // 2] if content is None else str(content)
    for name in (*names, middle):
        found = handle.layer(name, shape)
        if found.layout is None or not found.spatial:
            raise NotApplicable(
                f"layer {name!r} ({found.kind}) gives no map with several positions, so it has no style"
            )
    return names, middle
