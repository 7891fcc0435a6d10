"""Textures like an image's, and images in the style of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchloupe._models import ModelLike, opened
from torchloupe._visualize import rendered
from torchloupe_core.adam import Adam
from torchloupe_core.colour import matched
from torchloupe_core.errors import BadInput
from torchloupe_core.footprint import probe, require_room
from torchloupe_core.handle import Handle
from torchloupe_core.images import Pixels, read_pixels, require_pictures, scaled
from torchloupe_core.lbfgs import LBFGS
from torchloupe_core.making import Size
from torchloupe_core.parametrizations import Fourier, ParametrizationLike
from torchloupe_core.regularizers import TotalVariation
from torchloupe_core.style import Grams, Style, apart, grams_of, layers_for, mixed_grams
from torchloupe_core.targets import layer as of_layer
from torchloupe_core.terms import Nearness
from torchloupe_core.visualization import Visualization

__all__ = ["seen_as_pictures", "shares", "stylize", "texture"]

FIXED: dict[str, Any] = {"method": "native", "transforms": "none", "read": "post", "aim": 0.0}
FREQUENCIES = Fourier(colours=None)  # single pixels take up the checkerboards of strided convolutions


def texture(
    model: ModelLike,
    style: Any,
    *,
    n: int = 1,
    size: Size = None,
    layers: Sequence[object] | None = None,
    weights: Sequence[float] | None = None,
    tv: float = 0.05,
    steps: int = 300,
    optimizer: Literal["lbfgs", "adam"] = "lbfgs",
    lr: float | None = None,
    parametrization: ParametrizationLike = FREQUENCIES,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Visualization:
    """n images made from noise with the Gram matrices of a given one (Gatys et al. 2015, Texture Synthesis).

    style: a picture of any size, not preprocessed, or several, mixed by their weights. size: of what is made, the
    style's own unless given. layers: whose Gram matrices are compared, the last of each resolution but the coarsest,
    four at most, unless given. tv: weight of the total variation. optimizer: "lbfgs", whose line search never lets the
    loss rise, or "adam". options: of `visualize`, as seed, snapshots, interruptible, progress.

    `scores` are the relative squared distances of the Gram matrices at the end, the mean over the layers; of the
    diagnostics, `gram` and `gram_start` hold that of each layer at the end and for the noise at the start.
    """
    handle = opened(model, device=device, dtype=dtype)
    styles = _styles(handle, style, None)
    shape = _shape_of(styles[0]) if size is None else (styles[0].shape[1], *_pair(size))
    names, _ = layers_for(handle, probe(handle, shape), layers, None)
    for one in (shape, *map(_shape_of, styles)):
        require_room(handle, one, names, n if one == shape else 1)
    grams = mixed_grams([grams_of(handle, one, names) for one in styles], shares(weights, len(styles)))
    made = rendered(
        handle,
        [of_layer(names[-1])] * n,
        n=n,
        size=shape[1:],
        terms=(Style(names, grams=grams),),
        steps=steps,
        regularizers=[TotalVariation(tv, 2.0)] if tv else None,
        parametrization=parametrization,
        **_descent(optimizer, lr),
        **FIXED,
        **_free(options),
    )
    return _with_distances(handle, made, names, grams, "texture", None, optimizer)


def stylize(
    model: ModelLike,
    content: Any,
    style: Any,
    *,
    weights: Sequence[float] | None = None,
    style_weight: float = 1.0,
    content_weight: float = 1.0,
    tv: float = 0.05,
    preserve_colour: bool = False,
    layers: Sequence[object] | None = None,
    content_layer: object | None = None,
    size: int | None = None,
    style_size: int | None = None,
    steps: int = 100,
    optimizer: Literal["lbfgs", "adam"] = "lbfgs",
    lr: float | None = None,
    parametrization: ParametrizationLike = FREQUENCIES,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Visualization:
    """Images that show the content in the style of others (Gatys et al. 2016, Image Style Transfer).

    content: one or several pictures of one size, not preprocessed. style: a picture of any size, or several, mixed by
    their `weights`. Least is made `content_weight` times the relative squared distance of the content layer's
    activations from the content's own, plus `style_weight` times that of the Gram matrices from the style's, the mean
    over the layers, plus `tv` times the total variation; it begins from the content. preserve_colour: the style's
    colours are first mapped to the content's. layers: of the style, the last of each resolution but the coarsest, four
    at most, unless given; content_layer: the last of the resolution in the middle. size, style_size: pixels of the
    longer side to scale content and styles to; a style larger than the content is scaled down to it.
    options: of `visualize`, as seed, snapshots, interruptible, progress.

    `scores` are the Gram matrices' distances at the end; of the diagnostics, `gram`, `gram_start` hold them layer by
    layer, at the end and for the content itself, and `content` the distance of the content layer. Raises `BadInput`
    for a picture that the memory does not suffice for, with the size that fits.
    """
    handle = opened(model, device=device, dtype=dtype)
    if min(style_weight, content_weight, tv) < 0 or style_weight + content_weight <= 0:
        raise BadInput("style_weight, content_weight and tv are at least 0, and one of the first two is above it")
    given = seen_as_pictures(handle, content, size)
    styles = _styles(handle, style, style_size, most=max(given.shape[2:]))
    if any(one.shape[1] != given.shape[1] for one in styles):
        raise BadInput(f"the content has {given.shape[1]} channels, the style {styles[0].shape[1]}")
    names, middle = layers_for(handle, probe(handle, _shape_of(given)), layers, content_layer)
    require_room(handle, _shape_of(given), (*names, middle), len(given))
    share = shares(weights, len(styles))
    each = [[matched(one, image[None]) for one in styles] for image in given] if preserve_colour else [styles]
    mixes = [mixed_grams([grams_of(handle, one, names) for one in row], share) for row in each]
    grams = {name: torch.cat([mix[name] for mix in mixes]) for name in names}
    made = rendered(
        handle,
        [of_layer(middle)] * len(given),
        init=Pixels(given),
        compare=Pixels(given),
        terms=(Nearness((middle,), content_weight), Style(names, style_weight, grams=grams)),
        steps=steps,
        regularizers=[TotalVariation(tv, 2.0)] if tv else None,
        parametrization=parametrization,
        **_descent(optimizer, lr),
        **FIXED,
        **_free(options),
    )
    found = _with_distances(handle, made, names, grams, "stylized", given, optimizer)
    return replace(found, diagnostics={**found.diagnostics, **_content(handle, found, given, middle)})


def seen_as_pictures(handle: Handle, image: Any, size: int | None) -> Tensor:
    """`[N, C, H, W]` in [0, 1]: pictures as they are; for a model of one input size, preprocessed for it."""
    working = torch.promote_types(handle.dtype, torch.float32)
    if handle.spec.fixed_size:
        if size is not None:
            raise BadInput(f"the model takes inputs of {list(handle.input_shape)} only; leave out size=")
        inputs = handle.inputs(image)
        require_pictures(inputs, handle.spec)
        return handle.spec.pixels(inputs).to(working)
    return read_pixels(image, handle.spec, device=handle.device, dtype=working, longest=size).values


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """What each of several styles counts for; together 1."""
    given = [1.0] * count if weights is None else [float(one) for one in weights]
    if len(given) != count:
        raise BadInput(f"{len(given)} weights for {count} style{'s' * (count > 1)}; give one for each")
    if min(given) < 0 or not 0 < sum(given) < float("inf"):
        raise BadInput(f"weights of styles are at least 0, and not all of them; got {given}")
    return [one / sum(given) for one in given]


def _styles(handle: Handle, style: Any, size: int | None, most: int | None = None) -> list[Tensor]:
    """Each style as pixels `[1, C, H, W]`, of its own size, or scaled down to the most of a longer side."""
    if isinstance(style, Tensor):
        several = [*style] if style.ndim == 4 else [style]
    else:
        several = list(style) if isinstance(style, (list, tuple)) else [style]
    if not several:
        raise BadInput("no style was given")
    found = [image[None] for one in several for image in seen_as_pictures(handle, one, size)]  # a folder holds several
    if most is None or size is not None or handle.spec.fixed_size:
        return found
    return [scaled(one, most) if max(one.shape[2:]) > most else one for one in found]


def _descent(optimizer: str, lr: float | None) -> dict[str, Any]:
    if optimizer not in ("lbfgs", "adam"):
        raise BadInput(f'optimizer is "lbfgs" or "adam"; got {optimizer!r}')
    if optimizer == "adam":
        return {"optimizer": Adam, "lr": lr}
    return {"optimizer": LBFGS, "lr": 1.0 if lr is None else lr}


def _free(options: dict[str, Any]) -> dict[str, Any]:
    """Options that are the user's to choose."""
    if clash := sorted((FIXED.keys() | {"init", "compare", "regularizers", "terms"}) & options.keys()):
        raise BadInput(f"{', '.join(clash)} cannot be chosen here")
    return options


def _with_distances(
    handle: Handle, made: Visualization, names: Sequence[str], grams: Grams, kind: str, given: Tensor | None, how: str
) -> Visualization:
    """The result with how far its Gram matrices are from those wanted, layer by layer."""
    channels = handle.spec.channels or 3
    ends = _apart(handle, made.images[:, :channels], names, grams)  # [n, layers]
    facts: dict[str, Any] = {"label": "distance", "gram": _by_layer(names, ends)}
    if given is not None:
        start = _apart(handle, given[: len(made)], names, grams)
        facts["gram_start"] = _by_layer(names, start)
    return replace(
        made,
        target=kind,
        scores=ends.mean(1),
        options={**made.options, "optimizer": how, "layers": list(names)},
        diagnostics={**{key: value for key, value in made.diagnostics.items() if key == "seen_as"}, **facts},
    )


def _apart(handle: Handle, images: Tensor, names: Sequence[str], grams: Grams) -> Tensor:
    """`[n, layers]`, on the CPU."""
    working = torch.promote_types(handle.dtype, torch.float32)
    found = grams_of(handle, images.to(handle.device, working), names)
    return torch.stack([apart(found[name], grams[name][: len(images)]) for name in names], 1).float().cpu()


def _by_layer(names: Sequence[str], values: Tensor) -> list[list[list[Any]]]:
    return [[[name, value] for name, value in zip(names, row, strict=True)] for row in values.tolist()]


def _content(handle: Handle, made: Visualization, given: Tensor, layer: str) -> dict[str, Any]:
    from torchloupe_core.methods.inversion import distances

    images = made.images[:, : given.shape[1]].to(given)
    return {"content": distances(handle, images, given[: len(made)], [layer])[:, 0].tolist(), "content_layer": layer}


def _shape_of(images: Tensor) -> tuple[int, int, int]:
    return images.shape[1], images.shape[2], images.shape[3]


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size or (1, 1)
