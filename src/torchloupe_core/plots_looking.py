"""Drawings of filters and feature maps: small pictures side by side, each with its number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchloupe_core import mosaic, plots
from torchloupe_core.activations import Activations
from torchloupe_core.errors import BadInput
from torchloupe_core.filters import Filters

__all__ = ["overlay"]

TILE, CELL, MASKED = 60, 34, 110  # pixels across a tile: of maps, of single weights, of masked pictures
LEAST_WIDTH = 480  # pixels, so that titles have room
MOST_FILTERS, MOST_ROWS = 144, 12
MOST_IMAGES, MOST_MAPS, COLUMNS = 6, 64, 8
DIMMED = 0.25  # of the brightness, outside a mask


def overlay(found: Activations, place: int, *, alpha: float = 0.6) -> Tensor:
    """`[N, 3, H, W]` in [0, 1], for the channel at that place: dimmed outside its mask, or the map in colour."""
    one = found.only([place])
    if one.masks is not None:
        return found.images * torch.where(one.masks, 1.0, DIMMED)
    values = one.upsample()[:, 0]
    grey = found.images.mean(1, keepdim=True).expand(-1, 3, -1, -1)  # so that colour means the map
    signed = bool((values < 0).any())
    return torch.stack([plots.blended(image, each, signed, alpha) for image, each in zip(grey, values, strict=True)])


# -- filters ----------------------------------------------------------------------------------------------------------


@plots.draw.register
def _draw_filters(
    filters: Filters, new_figure: Callable[..., Any], *, most: int | None = None, most_inputs: int | None = None
) -> tuple[Any, Any]:
    """A tile for each filter where it is one picture, else a row of its strongest inputs."""
    values = filters.normalize()
    values = values if values.ndim == 4 else values[:, :, None, None]
    single = filters.colour or values.shape[1] == 1
    size = CELL if values.shape[2:] == (1, 1) else TILE
    shown = min(len(filters), most or (MOST_FILTERS if single else MOST_ROWS))
    names = list(filters.names or map(str, filters.channels))[:shown]
    if single:
        tiles = (values[:shown] + 1) / 2 if filters.colour else mosaic.tinted(values[:shown, 0], True, (-1, 1))
        columns = min(shown, max(COLUMNS, math.ceil(math.sqrt(1.5 * shown))))
        labels, rows = names, []
    else:
        columns, rows = min(values.shape[1], most_inputs or LEAST_WIDTH * 3 // 2 // size), names
        values, inputs = _strongest(values[:shown], filters.inputs[:shown], columns)
        tiles, labels = (
            mosaic.tinted(values.flatten(0, 1), True, (-1, 1)),
            [str(one) for one in inputs.flatten().tolist()],
        )
    picture, corners = mosaic.tiled(tiles, columns, size)
    height, width = picture.shape[1:]
    drawing = new_figure(
        figsize=((max(width, LEAST_WIDTH) + 130) / mosaic.INCH, (height + 90) / mosaic.INCH), layout="constrained"
    )
    axes = drawing.subplots()
    mosaic.place(axes, picture, corners, labels, rows)
    largest = filters.images.abs().max().item()
    if filters.scale == "shared" and not filters.colour and largest > 0:
        plots.colour_bar(drawing, axes, (-largest, largest), True, fraction=0.03, aspect=25)
    mosaic.title(drawing, _filters_title(filters, shown, 0 if single else columns, largest))
    return drawing, axes


def _strongest(values: Tensor, inputs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each filter the inputs of largest norm; rows of linear layers are not sorted yet."""
    order = values.flatten(2).norm(dim=2).argsort(dim=1, descending=True, stable=True)[:, :count]
    return values.take_along_dim(order[:, :, None, None], 1), inputs.take_along_dim(order, 1)


def _filters_title(filters: Filters, shown: int, columns: int, largest: float) -> list[str]:
    facts = filters.diagnostics
    head = f"{filters.layer} over {filters.to}" if filters.to else f"{filters.layer} ({facts.get('kind', 'filters')})"
    if "flattened" in facts:
        head += f", over the map of {facts['flattened']}, flattened"
    what = f"{mosaic.some(shown, len(filters))} {'rows' if filters.images.ndim == 2 else 'filters'}"
    if columns:
        what += (
            f", each with {mosaic.some(columns, filters.images.shape[1])} inputs, by weight; numbers are input channels"
        )
    zero = "grey" if filters.colour else "white"
    scale = f"one scale for all, up to ±{largest:.3g}" if filters.scale == "shared" else "each filter on its own scale"
    lines = [head, what, f"{scale}; {zero} is zero"]
    if filters.to:
        ignored = ", ".join(f"{kind} ({number})" for kind, number in facts.get("ignored", {}).items()) or "none"
        lines.append(f"nonlinearities ignored: {ignored}{'; cut off at the border' if facts.get('clipped') else ''}")
    return lines


# -- activations ------------------------------------------------------------------------------------------------------


@plots.draw.register
def _draw_activations(
    found: Activations,
    new_figure: Callable[..., Any],
    *,
    most: int | None = None,
    most_images: int = MOST_IMAGES,
    scale: str = "shared",
) -> tuple[Any, Any]:
    """For each image a tile for each channel: its map, or with a threshold the picture, dark where it is below."""
    if scale not in ("shared", "each"):
        raise BadInput(f'scale is "shared" or "each"; got {scale!r}')
    images = min(len(found), most_images)
    shown = found.only(_most_active(found, most or max(MOST_MAPS // images, 2 * COLUMNS)))
    values = shown.maps[:images]
    signed = bool((values < 0).any())
    ends = plots.scale(values, signed) if scale == "shared" and found.thresholds is None else None
    size = TILE if found.thresholds is None else MASKED
    columns = min(COLUMNS, len(shown.channels))
    mosaics = [mosaic.tiled(_map_tiles(shown[index], signed, ends), columns, size) for index in range(images)]
    height, width = mosaics[0][0].shape[1:]
    beside = min(max(height, 150), 220)
    across, down = beside + max(width, LEAST_WIDTH - beside) + 130, images * max(height, beside) + 90
    drawing = new_figure(figsize=(across / mosaic.INCH, down / mosaic.INCH), layout="constrained")
    axes = drawing.subplots(images, 2, squeeze=False, width_ratios=[beside, width])
    for index, (picture, corners) in enumerate(mosaics):
        mosaic.place(axes[index, 0], found.images[index], [], [])
        mosaic.place(axes[index, 1], picture, corners, _map_labels(shown))
    if ends is not None:
        plots.colour_bar(drawing, axes[:, 1], ends, signed, fraction=0.03, aspect=25)
    mosaic.title(drawing, _maps_title(found, len(shown.channels), images, scale))
    return drawing, axes


def _most_active(found: Activations, most: int) -> list[int]:
    """The places of at most so many channels: those that reach highest, in order."""
    highest = found.maps.amax((0, 2, 3))
    return sorted(highest.argsort(descending=True, stable=True)[:most].tolist())


def _map_tiles(one: Activations, signed: bool, ends: tuple[float, float] | None) -> Tensor:
    """`[C, 3, h, w]`: the tiles of one image."""
    if one.thresholds is not None:
        return torch.cat([overlay(one, place) for place in range(len(one.channels))])
    if ends is not None:
        return mosaic.tinted(one.maps[0], signed, ends)
    return torch.cat([mosaic.tinted(each[None], signed, plots.scale(each, signed)) for each in one.maps[0]])


def _map_labels(shown: Activations) -> list[str]:
    if shown.thresholds is None:
        return [str(channel) for channel in shown.channels]
    values = shown.thresholds.tolist()
    return [f"{channel} > {value:.3g}" for channel, value in zip(shown.channels, values, strict=True)]


def _maps_title(found: Activations, channels: int, images: int, scale: str) -> list[str]:
    what = f"{found.layer}: channel {found.channels[0]}"
    if len(found.channels) > 1:
        what = f"{found.layer}: {mosaic.some(channels, len(found.channels))} channels, by number"
        what += ", those that reach highest" if channels < len(found.channels) else ""
    if found.thresholds is not None:
        how = f"bright where the channel exceeds its threshold ({found.threshold})"
    else:
        how = "one scale for all maps" if scale == "shared" else "each map on its own scale"
    return [what, how, *([f"{images} of {len(found)} images"] if images < len(found) else [])]
