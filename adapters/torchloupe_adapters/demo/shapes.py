"""The shapes of the scenes' objects.

Each is a distance to its own edge, positive inside, on the frame [-1, 1] of an object: u right, v down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "PARTS", "PART_NAMES", "SHAPES", "Distance", "Floats", "glyph"]

Floats = NDArray[np.float32]
Distance = Callable[[Floats, Floats], Floats]


def _box(x: float, y: float, half_width: float, half_height: float) -> Distance:
    return lambda u, v: np.minimum(half_width - np.abs(u - x), half_height - np.abs(v - y))


def _disc(x: float, y: float, radius: float) -> Distance:
    return lambda u, v: radius - np.hypot(u - x, v - y)


def _annulus(x: float, y: float, radius: float, half_width: float) -> Distance:
    return lambda u, v: half_width - np.abs(np.hypot(u - x, v - y) - radius)


def _ellipse(x: float, y: float, a: float, b: float) -> Distance:
    return lambda u, v: (1 - np.hypot((u - x) / a, (v - y) / b)) * min(a, b)


def _diamond(radius: float) -> Distance:
    return lambda u, v: np.subtract(radius, np.abs(u) + np.abs(v))


def _half_plane(nx: float, ny: float, offset: float) -> Distance:
    return lambda u, v: offset - nx * u - ny * v


def _union(*shapes: Distance) -> Distance:
    return lambda u, v: functools.reduce(np.maximum, [shape(u, v) for shape in shapes])


def _intersection(*shapes: Distance) -> Distance:
    return lambda u, v: functools.reduce(np.minimum, [shape(u, v) for shape in shapes])


def _polygon(*corners: tuple[float, float]) -> Distance:
    """Convex polygon, corners in clockwise order on the screen."""
    edges = []
    for (x, y), (next_x, next_y) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = float(np.hypot(next_x - x, next_y - y))
        nx, ny = (next_y - y) / length, (x - next_x) / length
        edges.append(_half_plane(nx, ny, nx * x + ny * y))
    return _intersection(*edges)


def _petals(u: Floats, v: Floats) -> Floats:
    reach: Floats = 0.62 + 0.36 * np.cos(6 * np.arctan2(v, u))
    return reach - np.hypot(u, v)


def _star(u: Floats, v: Floats) -> Floats:
    wedge = 2 * float(np.pi) / 5
    angle: Floats = np.abs((np.arctan2(u, -v) + wedge / 2) % wedge - wedge / 2)
    radius = np.hypot(u, v)
    # All ten edges fold onto one: from the tip (1, 0) to the inner corner at radius 0.42.
    inner_x, inner_y = 0.42 * float(np.cos(wedge / 2)), 0.42 * float(np.sin(wedge / 2))
    length = float(np.hypot(inner_y, 1 - inner_x))
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    return np.asarray(((1 - x) * inner_y - y * (1 - inner_x)) / length, dtype=np.float32)


def glyph(u: Floats, v: Floats, digits: Floats) -> Floats:
    """Digit images `[N, 8, 8]`, read bilinearly; the ink above 0.45 is inside."""
    column, row = (u / 0.62 + 1) * 3.5, (v / 0.75 + 1) * 3.5
    inside = (column >= 0) & (column < 7) & (row >= 0) & (row < 7)
    column, row = np.clip(column, 0, 6.999), np.clip(row, 0, 6.999)
    left, top = column.astype(np.int64), row.astype(np.int64)
    right_share, bottom_share = column - left, row - top
    image = np.arange(len(digits))[:, None, None]
    upper = digits[image, top, left] * (1 - right_share) + digits[image, top, left + 1] * right_share
    lower = digits[image, top + 1, left] * (1 - right_share) + digits[image, top + 1, left + 1] * right_share
    ink = upper * (1 - bottom_share) + lower * bottom_share
    return np.where(inside, (ink - 0.45) * 0.3, -1).astype(np.float32)


# Later parts are painted over earlier ones; the first one carries the texture.
SHAPES: dict[str, dict[str, Distance]] = {
    "house": {
        "wall": _box(0, 0.4, 0.7, 0.6),
        "roof": _polygon((-0.95, -0.15), (0, -1), (0.95, -0.15)),
        "door": _box(0, 0.65, 0.18, 0.35),
    },
    "tree": {
        "crown": _union(_disc(-0.4, -0.15, 0.45), _disc(0.4, -0.15, 0.45), _disc(0, -0.5, 0.5)),
        "trunk": _box(0, 0.6, 0.14, 0.4),
    },
    "car": {
        "body": _box(0, 0.2, 1, 0.28),
        "cabin": _box(-0.05, -0.28, 0.5, 0.25),
        "wheel": _union(_disc(-0.55, 0.5, 0.27), _disc(0.55, 0.5, 0.27)),
    },
    "fish": {
        "body": _ellipse(-0.2, 0, 0.75, 0.48),
        "tail": _polygon((0.35, 0), (1, -0.55), (1, 0.55)),
        "eye": _disc(-0.6, -0.1, 0.12),
    },
    "flower": {"petal": _petals, "disc": _disc(0, 0, 0.32)},
    "face": {
        "head": _disc(0, 0, 0.95),
        "eyes": _union(_disc(-0.35, -0.25, 0.16), _disc(0.35, -0.25, 0.16)),
        "mouth": _intersection(_annulus(0, 0.05, 0.5, 0.1), _half_plane(0, -1, -0.25)),
    },
    "star": {"star": _star},
    "ring": {"ring": _annulus(0, 0, 0.72, 0.22)},
    "mushroom": {
        "cap": _intersection(_disc(0, 0.1, 0.95), _half_plane(0, 1, 0.1)),
        "stem": _box(0, 0.5, 0.24, 0.42),
    },
    "key": {
        "bow": _annulus(-0.6, 0, 0.27, 0.14),
        "shaft": _union(_box(0.36, 0, 0.62, 0.1), _box(0.9, 0.2, 0.08, 0.22), _box(0.6, 0.2, 0.08, 0.22)),
    },
    "boat": {
        "hull": _polygon((-0.8, 0.3), (0.8, 0.3), (0.55, 0.8), (-0.55, 0.8)),
        "mast": _box(0, -0.3, 0.06, 0.62),
        "sail": _polygon((0.08, -0.95), (0.8, 0.2), (0.08, 0.2)),
    },
    "tag": {
        "plate": _intersection(_box(0, 0, 0.75, 0.9), _diamond(1.35)),
        "glyph": lambda u, v: np.full_like(u, -1),
    },  # the glyph is a digit image: `glyph`
}
CLASSES = tuple(SHAPES)
PARTS = tuple(tuple(parts) for parts in SHAPES.values())
PART_NAMES = tuple(f"{name}/{part}" for name, parts in SHAPES.items() for part in parts)
