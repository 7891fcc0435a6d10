"""Units side by side: together, against each other, beside what a data set shows of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe._examples import examples
from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe._visualize import rendered
from torchloupe_core.channels import select
from torchloupe_core.errors import NotApplicable
from torchloupe_core.examples import Examples
from torchloupe_core.gallery import Gallery
from torchloupe_core.handle import Handle
from torchloupe_core.parametrizations import Pixel
from torchloupe_core.preactivation import read_before_rectifier
from torchloupe_core.targets import Target, TargetLike, as_target, channel, direction, interpolate, logit
from torchloupe_core.visualization import Visualization

__all__ = ["class_prototype", "directions", "interactions", "spectrum"]


def interactions(
    model: ModelLike, a: TargetLike, b: TargetLike, *, between: int = 3, steps: int = 256, **options: Any
) -> Visualization:
    """Two targets alone, added, subtracted and interpolated, as one figure (Olah et al. 2017).

    The images, in order: a, b, a + b, a - b, b - a, and `between` of them on the way from a to b. options: of
    `visualize`, among them n=1 only.
    """
    first, second = as_target(a), as_target(b)
    path = interpolate(first, second, between + 2)[1:-1] if between > 0 else []
    wanted = [first, second, first + second, first - second, second - first, *path]
    return rendered(opened(model), wanted, steps=steps, **options)


def directions(
    model: ModelLike,
    layer: object,
    dataset: Any,
    *,
    channels: Sequence[int] | None = None,
    n: int = 4,
    k: int = 4,
    steps: int = 256,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Gallery:
    """Channels of a layer beside random directions: an optimised image and the k data set images that excite each most.

    n of each; the channels at random unless given. Szegedy et al. 2014 (Intriguing properties of neural networks) found
    random directions as meaningful as units, Olah et al. 2017 less often. Random directions are of length 1, uniform on
    the sphere. options: of `visualize`.
    """
    handle = opened(model)
    read = handle.layer(layer)
    if read.layout is None:
        raise NotApplicable(f"layer {str(layer)!r} ({read.kind}) gives no map of channels, so it has no directions")
    count, source = read.layout.channels, torch.Generator().manual_seed(seed)
    chosen = (
        torch.randperm(count, generator=source)[:n].tolist()
        if channels is None
        else select(channels, count, str(layer))
    )
    vectors = torch.nn.functional.normalize(torch.randn(n, count, generator=source, dtype=torch.float64), dim=1)
    wanted = [*(channel(layer, one) for one in chosen), *(direction(layer, one) for one in vectors)]
    names = [*map(str, wanted[: len(chosen)]), *(f"{layer}: random direction {one + 1}" for one in range(n))]
    found = examples(handle, dataset, wanted, k=k, crop="image", batch_size=batch_size, progress=progress)
    made = rendered(handle, wanted, steps=steps, seed=seed, batch_size=batch_size, progress=progress, **options)
    columns = ("optimised", *(f"example {place + 1}" for place in range(found.scores.shape[1])))
    return _beside(handle, made, found, tuple(names), columns, [0], {"directions": vectors.tolist()})


def spectrum(
    model: ModelLike,
    unit: TargetLike | Sequence[TargetLike],
    dataset: Any,
    *,
    k: int = 5,
    steps: int = 256,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Gallery:
    """Data set images from a unit's lowest answer to its highest, between the images made for its negative and for it.

    The k examples are those of `examples(band="spectrum", crop="image")`: minimum, slightly negative, median, slightly
    positive, maximum (Olah et al. 2017), where possible before the unit's ReLU, since behind it all that is below zero
    is alike. options: of `visualize`.
    """
    handle = opened(model)
    units = [unit] if isinstance(unit, (str, int, Target)) else list(unit)
    shape = handle.input_shape
    wanted = []
    for one in map(as_target, units):
        with contextlib.suppress(NotApplicable):
            one = read_before_rectifier(handle, one, shape)
        wanted.append(one)
    shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    found = examples(handle, dataset, wanted, k=k, crop="image", band="spectrum", **shared)
    made = rendered(handle, [each for one in wanted for each in (-one, one)], steps=steps, **shared, **options)
    columns = ("optimised negative", *found.bands, "optimised positive")
    names = tuple(str(as_target(one)) for one in units)
    return _beside(handle, made, found, names, columns, [0, len(columns) - 1], {"read": list(found.units)})


def class_prototype(
    model: ModelLike, cls: str | int | Sequence[str | int], *, weight: float = 100.0, steps: int = 256, **options: Any
) -> Gallery:
    """The image of a class as in 2013 beside today's: the logit less `weight` times the pixels' mean square.

    Simonyan et al. 2013, Deep Inside Convolutional Networks, eq. 1: single pixels, from grey, nothing but the L2 norm.
    Other than there the pixels are kept in range by a sigmoid and the steps are Adam's. options: of `visualize`, for
    both.
    """
    handle = opened(model)
    classes = [cls] if isinstance(cls, (str, int)) else list(cls)
    wanted = [logit(one) for one in classes]
    bare: dict[str, Any] = {"parametrization": Pixel(sd=0.0, colours=None), "transforms": "none"}
    historic = rendered(handle, wanted, steps=steps, **{**options, **bare, "regularizers": {"l2": weight}})
    modern = rendered(handle, wanted, steps=steps, **options)
    facts = {"seen_as": [one.diagnostics.get("seen_as") for one in (historic, modern)]}
    return Gallery(
        **_provenance(modern, historic),
        images=torch.stack([historic.images, modern.images], 1),
        rows=tuple(map(str, wanted)),
        columns=("L2 of pixels, 2013", "today"),
        values=torch.stack([historic.scores, modern.scores], 1),
        indices=torch.full((len(wanted), 2), -1),
        diagnostics=facts,
    )


def _beside(
    handle: Handle,
    made: Visualization,
    found: Examples,
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    optimised: Sequence[int],
    facts: dict[str, Any],
) -> Gallery:
    """A gallery of examples, with optimised images at some of the columns; of maps the largest value counts."""
    shape, per_row = (len(rows), len(columns)), len(optimised)
    values_made = _largest(handle, made, [one for one in found.units for _ in optimised])
    images, values, indices = torch.ones(*shape, 3, *made.size), torch.empty(shape), torch.full(shape, -1)
    others = [column for column in range(len(columns)) if column not in optimised]
    values[:, others], indices[:, others] = found.scores, found.indices
    for row, crops in enumerate(found.crops):
        for column, crop in zip(others, crops, strict=True):
            if crop is not None:
                images[row, column] = _sized(crop, made.size)
    for place, column in enumerate(optimised):
        images[:, column], values[:, column] = made.images[place::per_row], values_made[place::per_row]
    return Gallery(
        **_provenance(made),
        images=images,
        rows=rows,
        columns=columns,
        values=values,
        indices=indices,
        diagnostics={**facts, "skipped": found.skipped},
    )


def _largest(handle: Handle, made: Visualization, units: Sequence[str]) -> Tensor:
    """As `examples` scores images, `[n]`; NaN where the pictures show some of the model's channels only."""
    channels = handle.input_shape[0]
    if channels > 3:
        return torch.full((len(made),), float("nan"))
    inputs = handle.spec.normalised(made.images[:, :channels]).to(handle.device, handle.dtype)
    return handle.score(inputs, units, reduce="max").float()


def _sized(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def _provenance(*made: Visualization) -> dict[str, Any]:
    """Who made the images, and what it took."""
    first = made[0]
    return {
        "method": first.method,
        "backend": first.backend,
        "seed": first.seed,
        "seconds": sum(one.seconds for one in made),
        "forwards": sum(one.forwards for one in made),
        "versions": versions(first.backend),
        "options": first.options,
    }
