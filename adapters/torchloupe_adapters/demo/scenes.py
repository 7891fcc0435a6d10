"""Procedural scenes with known truth: what is drawn where, in which colour, and under which label.

Parameters are sampled first and images rendered from them, so rendering again with one parameter changed gives an
exact counterfactual pair. Scene i depends on (seed, i) alone: a longer data set begins with the shorter one. An option
such as `watermark=0.5` only thresholds draws that are made anyway, so it changes nothing but what it names; the one
exception is `two_object`, which moves and shrinks the first object where it makes room for a second.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from torchloupe_adapters import sklearn
from torchloupe_adapters.demo.shapes import CLASSES, PART_NAMES, PARTS, SHAPES, Floats, glyph
from torchloupe_core.errors import BadInput

__all__ = [
    "CLASSES",
    "COLORS",
    "PARTS",
    "PART_NAMES",
    "SIZE",
    "TEXTURES",
    "Rendered",
    "SceneParams",
    "Scenes",
    "demo_scenes",
    "render",
    "sample",
]

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

SIZE = 64
TEXTURES = ("solid", "stripes", "checker", "dots")
COLORS = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.90, 0.15),
    "green": (0.15, 0.65, 0.20),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.60, 0.20, 0.75),
    "white": (0.95, 0.95, 0.95),
}
BACKDOOR_CLASS = "mushroom"
MIN_OFFSET = 10  # px, in x or in y, between the centre of a single object and the centre of the image
WATERMARK_MARGIN = 8  # px to the border

_BLOCK = 256  # random numbers are drawn for this many scenes at once
_PARAMETERS, _NOISE, _PHOTOS, _CLUTTER, _GRAIN = range(5)  # streams of random numbers of one block
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_MIDDLE = (SIZE - 1) / 2
_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
_WATERMARK = np.array(
    [
        [symbol == "#" for symbol in row]
        for row in (
            "####....####",
            "#...#..#....",
            "#.#.##.#.##.",
            "#...#..#....",
            "####.##.####",
            "............",
            "############",
            "............",
        )
    ]
)

# Parameters.


@dataclass(frozen=True, eq=False)
class SceneParams:
    """Everything that decides n scenes. Slot 0 is the object in question, slot 1 the second one, drawn under it.

    Positions are (x, y) in pixels. `color` gives one colour per part; classes, colours and textures are indices into
    `CLASSES`, `COLORS` and `TEXTURES`. Slot 1 is filled in for every scene, but drawn only where `n_objects` is 2.
    """

    seed: int
    objects: Ints  # [n, 2] true class of each object
    n_objects: Ints  # [n] 1 or 2
    scale: Floats  # [n, 2] half the width of an object, px
    angle: Floats  # [n, 2] radians
    flip: Flags  # [n, 2] mirrored left to right; a tag never is
    center: Floats  # [n, 2, 2]
    color: Ints  # [n, 2, 3]
    texture: Ints  # [n, 2]
    phase: Floats  # [n, 2] shift of the texture, radians
    digit: Ints  # [n, 2] which handwritten digit a tag carries
    background: Ints  # [n] 0 noise, 1 photograph, 2 a mix of both
    watermark: Flags  # [n]
    watermark_position: Ints  # [n, 2] top left corner
    labels: Ints  # [n] the given class

    @property
    def mislabelled(self) -> Flags:
        """Where the given label is not the true class of the first object, `[n]`."""
        return np.not_equal(self.labels, self.objects[:, 0])

    def replace(self, **changes: object) -> SceneParams:
        """The same scenes with some parameters changed; a value broadcasts, as in `replace(watermark=True)`."""
        fitted: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in {field.name for field in dataclasses.fields(self)} - {"seed"}:
                raise BadInput(f"SceneParams.replace cannot change {name!r}")
            current = getattr(self, name)
            try:
                fitted[name] = np.broadcast_to(np.asarray(value, current.dtype), current.shape).copy()
            except ValueError as error:
                raise BadInput(f"{name} must fit {list(current.shape)}, got {value!r}") from error
        return dataclasses.replace(self, **fitted)

    def __len__(self) -> int:
        return len(self.labels)


def sample(
    n: int,
    seed: int,
    *,
    two_object: float = 0.0,
    watermark: float = 0.0,
    mislabelled: float = 0.0,
    backdoor: float = 0.0,
) -> SceneParams:
    """Draw the parameters of n scenes.

    `two_object`, `watermark` and `mislabelled` are the shares of scenes with a second object, with a watermark and with
    a wrong given label. `backdoor` is the share of the scenes of other classes that get a watermark and the given label
    "mushroom". Raises `BadInput` for n < 1, a negative seed or a share outside 0..1.
    """
    if n < 1 or seed < 0:
        raise BadInput(f"scenes need n >= 1 and seed >= 0, got n={n} and seed={seed}")
    _check_shares(two_object=two_object, watermark=watermark, mislabelled=mislabelled, backdoor=backdoor)
    blocks = [_draw_block(seed, block) for block in range(-(-n // _BLOCK))]
    draws = {name: np.concatenate([block[name] for block in blocks])[:n] for name in blocks[0]}

    objects = draws["objects"]
    two = draws.pop("two_object") < two_object
    scale, center = _layout(two, draws.pop("size"), draws.pop("place"), draws.pop("side"))
    wrong = draws.pop("mislabelled") < mislabelled
    labels = np.where(wrong, (objects[:, 0] + draws.pop("wrong_by")) % len(CLASSES), objects[:, 0])
    target = CLASSES.index(BACKDOOR_CLASS)
    poisoned = (draws.pop("backdoor") < backdoor) & (objects[:, 0] != target)
    return SceneParams(
        seed=seed,
        n_objects=1 + two.astype(np.int64),
        scale=scale,
        center=center,
        labels=np.where(poisoned, target, labels),
        watermark=(draws.pop("watermark") < watermark) | poisoned,
        **draws,
    )


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise BadInput(f"{name} is a share of the scenes, 0 to 1, got {share}")


def _draw_block(seed: int, block: int) -> dict[str, NDArray[Any]]:
    """Every random number of a block's parameters, in an order that no option changes."""
    rng = np.random.default_rng([seed, block, _PARAMETERS])
    pair = (_BLOCK, 2)
    first = rng.integers(0, len(CLASSES), _BLOCK)
    second = (first + rng.integers(1, len(CLASSES), _BLOCK)) % len(CLASSES)
    return {
        "objects": np.stack([first, second], 1),
        # The three parts differ in colour, or a door would vanish in its wall.
        "color": rng.permuted(np.tile(np.arange(len(COLORS)), (*pair, 1)), axis=2)[..., :3],
        "angle": rng.uniform(-0.4, 0.4, pair).astype(np.float32),
        "flip": rng.random(pair) < 0.5,
        "texture": rng.integers(0, len(TEXTURES), pair),
        "phase": rng.uniform(0, 2 * np.pi, pair).astype(np.float32),
        "digit": rng.integers(0, 1797, pair),
        "background": rng.integers(0, 3, _BLOCK),
        "watermark_position": _watermark_positions(rng),
        "size": rng.random(pair),
        "place": rng.random((*pair, 2)),
        "side": rng.integers(0, 2, pair),
        "two_object": rng.random(_BLOCK),
        "watermark": rng.random(_BLOCK),
        "backdoor": rng.random(_BLOCK),
        "mislabelled": rng.random(_BLOCK),
        "wrong_by": rng.integers(1, len(CLASSES), _BLOCK),
    }


def _watermark_positions(rng: np.random.Generator) -> Ints:
    """Anywhere along the top or the bottom margin, (x, y) of the top left corner `[block, 2]`."""
    height, width = _WATERMARK.shape
    x = rng.integers(WATERMARK_MARGIN, SIZE - WATERMARK_MARGIN - width + 1, _BLOCK)
    y = np.where(rng.random(_BLOCK) < 0.5, WATERMARK_MARGIN, SIZE - WATERMARK_MARGIN - height)
    return np.stack([x, y], 1)


def _layout(two: Flags, size: NDArray[Any], place: NDArray[Any], side: NDArray[Any]) -> tuple[Floats, Floats]:
    """Scale `[n, 2]` and centre `[n, 2, 2]` of the objects of the objects. `side` `[n, 2]` is (axis, which half)."""
    scale = np.where(two[:, None], 10 + 4 * size, 11 + 7 * size)
    reach = 0.95 * scale[..., None]  # px from the centre of an object to its edge

    offset = 2 * place - 1  # uniform on a square, then on that square less a smaller one in its middle
    radius = np.abs(offset).max(-1, keepdims=True)
    inner = MIN_OFFSET / (_MIDDLE - reach)
    offset = offset * np.sqrt(inner**2 + (1 - inner**2) * radius**2) / np.maximum(radius, 1e-9)
    single = _MIDDLE + offset * (_MIDDLE - reach)

    anywhere = reach + place * (2 * _MIDDLE - 2 * reach)
    near_half = reach + place * (_MIDDLE - 0.5 - 2 * reach)
    split_axis = side[:, None, :1] == np.arange(2)  # [n, 1, 2]
    far = (side[:, 1:] == np.arange(2))[..., None]  # [n, 2, 1] one object in each half
    pair = np.where(split_axis, np.where(far, 2 * _MIDDLE - near_half, near_half), anywhere)
    return scale.astype(np.float32), np.where(two[:, None, None], pair, single).astype(np.float32)


# Rendering.


@dataclass(frozen=True, eq=False)
class Rendered:
    """Images and what is visible in them; a watermark lies on top and hides nothing from the other masks."""

    images: NDArray[np.uint8]  # [N, 3, 64, 64]
    object_masks: Flags  # [N, 2, 64, 64] one per slot
    part_map: NDArray[np.uint8]  # [N, 64, 64] 0 nothing, else 1 + index into PART_NAMES
    watermark_mask: Flags  # [N, 64, 64] its bounding box


@dataclass
class _Canvas:
    pixels: Floats
    objects: Flags
    parts: NDArray[np.uint8]

    def paint(self, rows: Ints, slot: int, coverage: Floats, color: Floats, part: int) -> None:
        """Lay one part over the scenes `rows`: coverage `[m, 64, 64]`, colour `[m, 3, 1, 1]` or `[m, 3, 64, 64]`."""
        opacity = coverage[:, None]
        self.pixels[rows] += opacity * (color - self.pixels[rows])
        index, y, x = np.nonzero(coverage > 0.5)
        scene = rows[index]
        self.objects[scene, slot, y, x] = True
        self.objects[scene, 1 - slot, y, x] = False
        self.parts[scene, y, x] = part + 1


def render(
    params: SceneParams, indices: Sequence[int] | Ints | None = None, *, without_objects: bool = False
) -> Rendered:
    """Draw the scenes at `indices` (all without them); `without_objects` leaves background and watermark only."""
    chosen = np.arange(len(params)) if indices is None else np.asarray(indices, dtype=np.int64)
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(params):
        raise BadInput(f"scene indices go from 0 to {len(params) - 1}, got {chosen.min()} to {chosen.max()}")
    n = len(chosen)
    out = Rendered(
        images=np.empty((n, 3, SIZE, SIZE), np.uint8),
        object_masks=np.zeros((n, 2, SIZE, SIZE), np.bool_),
        part_map=np.zeros((n, SIZE, SIZE), np.uint8),
        watermark_mask=np.zeros((n, SIZE, SIZE), np.bool_),
    )
    for block in np.unique(chosen // _BLOCK):
        rows = np.flatnonzero(chosen // _BLOCK == block)
        scenes = chosen[rows]
        canvas = _Canvas(_background(params, scenes), out.object_masks[rows], out.part_map[rows])
        for slot in () if without_objects else (1, 0):
            _draw_objects(canvas, params, scenes, slot)
        out.watermark_mask[rows] = _stamp(canvas.pixels, params, scenes)
        grain = _rng(params, scenes, _GRAIN).standard_normal((_BLOCK, 3, SIZE, SIZE), dtype=np.float32)
        pixels = np.clip(canvas.pixels + 0.02 * grain[scenes % _BLOCK], 0, 1)
        out.images[rows] = (pixels * 255 + 0.5).astype(np.uint8)
        out.object_masks[rows], out.part_map[rows] = canvas.objects, canvas.parts
    return out


def _rng(params: SceneParams, scenes: Ints, stream: int) -> np.random.Generator:
    return np.random.default_rng([params.seed, int(scenes[0]) // _BLOCK, stream])


def _draw_objects(canvas: _Canvas, params: SceneParams, scenes: Ints, slot: int) -> None:
    for label, name in enumerate(CLASSES):
        rows = np.flatnonzero((params.objects[scenes, slot] == label) & (params.n_objects[scenes] > slot))
        if not rows.size:
            continue
        at = (scenes[rows], slot)
        scale = _per_image(params.scale[at])
        u, v = _object_frame(params, at, mirrored=name != "tag")
        texture = _texture(params.texture[at], u, v, _per_image(params.phase[at]))
        for part, shape in enumerate(SHAPES[name].values()):
            part_name = f"{name}/{PARTS[label][part]}"
            is_glyph = part_name == "tag/glyph"
            distance = glyph(u, v, _digits()[params.digit[at]]) if is_glyph else shape(u, v)
            color = _PALETTE[params.color[at][:, part]][:, :, None, None]
            if part == 0:
                color = color * (1 - 0.55 * texture[:, None])
            # One pixel of anti-aliasing across the edge.
            canvas.paint(rows, slot, np.clip(distance * scale + 0.5, 0, 1), color, PART_NAMES.index(part_name))


def _per_image(values: NDArray[Any]) -> Floats:
    return values.astype(np.float32)[:, None, None]


def _object_frame(params: SceneParams, at: tuple[Ints, int], *, mirrored: bool) -> tuple[Floats, Floats]:
    """Coordinates u, v `[m, 64, 64]` of every pixel on the frame of the objects."""
    cos, sin = _per_image(np.cos(params.angle[at])), _per_image(np.sin(params.angle[at]))
    x = _COLUMNS - _per_image(params.center[at][:, 0])
    y = _ROWS - _per_image(params.center[at][:, 1])
    scale = _per_image(params.scale[at])
    u, v = (x * cos + y * sin) / scale, (y * cos - x * sin) / scale
    sign = _per_image(np.where(params.flip[at], -1, 1))
    return (u * sign if mirrored else u), v


def _texture(kind: Ints, u: Floats, v: Floats, phase: Floats) -> Floats:
    """Where the base colour is darkened, 0 or 1 `[m, 64, 64]`; `kind` indexes `TEXTURES`."""
    a, b = 7 * u + phase, 7 * v + phase
    patterns: tuple[Callable[[Floats, Floats], NDArray[Any]], ...] = (
        lambda a, b: np.zeros_like(a),
        lambda a, b: np.sin(1.6 * a) > 0,
        lambda a, b: (np.sin(a) > 0) ^ (np.sin(b) > 0),
        lambda a, b: np.cos(1.3 * a) + np.cos(1.3 * b) > 0.9,
    )
    out = np.zeros_like(u)
    for index, pattern in enumerate(patterns):
        out[kind == index] = pattern(a[kind == index], b[kind == index])
    return out


def _stamp(pixels: Floats, params: SceneParams, scenes: Ints) -> Flags:
    """Blend the watermark into `pixels`, in place; returns its boxes `[m, 64, 64]`."""
    height, width = _WATERMARK.shape
    boxes = np.zeros((len(scenes), SIZE, SIZE), np.bool_)
    for row in np.flatnonzero(params.watermark[scenes]):
        x, y = params.watermark_position[scenes[row]]
        patch = pixels[row, :, y : y + height, x : x + width]
        # White strokes on a darkened box, so that it shows on any background.
        patch += np.where(_WATERMARK, 0.85 * (1 - patch), -0.5 * patch)
        boxes[row, y : y + height, x : x + width] = True
    return boxes


def _background(params: SceneParams, scenes: Ints) -> Floats:
    """Noise, a photograph or their mean, under five bars and ellipses that belong to no class; `[m, 3, 64, 64]`."""
    photo_share = np.array([0, 1, 0.5], np.float32)[params.background[scenes]][:, None, None, None]
    noise = _noise(_rng(params, scenes, _NOISE), scenes % _BLOCK)
    photos = _photo_crops(_rng(params, scenes, _PHOTOS), scenes % _BLOCK)
    pixels = noise + photo_share * (photos - noise)
    _add_clutter(pixels, _rng(params, scenes, _CLUTTER), scenes % _BLOCK)
    return np.clip(pixels, 0, 1)


def _noise(rng: np.random.Generator, rows: Ints) -> Floats:
    """1/f noise: one field shared by the channels, for light and shade, and a weaker one in each, for colour."""
    exponent = rng.uniform(0.9, 1.7, _BLOCK).astype(np.float32)[rows, None, None]
    contrast = rng.uniform(0.1, 0.22, (_BLOCK, 1, 1, 1)).astype(np.float32)[rows]
    tint = rng.uniform(-0.25, 0.25, (_BLOCK, 3, 1, 1)).astype(np.float32)[rows]
    white = rng.standard_normal((_BLOCK, 4, SIZE, SIZE), dtype=np.float32)[rows]
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)).astype(np.float32)
    frequency[0, 0] = 1  # any value that is not zero: the mean is taken out below
    amplitude = frequency**-exponent
    amplitude[:, 0, 0] = 0
    fields = np.fft.irfft2(np.fft.rfft2(white) * amplitude[:, None], s=(SIZE, SIZE)).astype(np.float32)
    fields /= fields.std((2, 3), keepdims=True)
    return 0.5 + tint + contrast * (0.8 * fields[:, :1] + 0.5 * fields[:, 1:])


def _photo_crops(rng: np.random.Generator, rows: Ints) -> Floats:
    """Crops of two photographs at three scales, mirrored and with their colour channels in any order."""
    which = rng.integers(0, len(_photos()), _BLOCK)[rows]
    corner = rng.random((_BLOCK, 2))[rows]
    mirrored = (rng.random(_BLOCK) < 0.5)[rows]
    channels = rng.permuted(np.tile(np.arange(3), (_BLOCK, 1)), axis=1)[rows]
    crops = np.empty((len(rows), 3, SIZE, SIZE), np.float32)
    for index, (photo, (down, right)) in enumerate(zip(which, corner, strict=True)):
        picture = _photos()[photo]
        y, x = int(down * (picture.shape[1] - SIZE + 1)), int(right * (picture.shape[2] - SIZE + 1))
        crop = picture[channels[index], y : y + SIZE, x : x + SIZE]
        crops[index] = crop[:, :, ::-1] if mirrored[index] else crop
    return crops


def _add_clutter(pixels: Floats, rng: np.random.Generator, rows: Ints) -> None:
    for _ in range(5):
        draws = rng.random((_BLOCK, 8)).astype(np.float32)[rows]
        color = _PALETTE[rng.integers(0, len(COLORS), _BLOCK)[rows]]
        x, y, turn, length, width, kind, opacity, shade = (_per_image(column) for column in draws.T)
        cos, sin = np.cos(np.pi * turn), np.sin(np.pi * turn)
        u = (_COLUMNS - SIZE * x) * cos + (_ROWS - SIZE * y) * sin
        v = (_ROWS - SIZE * y) * cos - (_COLUMNS - SIZE * x) * sin
        length, width = 3 + 10 * length, 1 + 2.5 * width
        bar = np.minimum(length - np.abs(u), width - np.abs(v))
        ellipse = (1 - np.hypot(u / length, v / width)) * width
        coverage = np.clip(np.where(kind < 0.5, bar, ellipse) + 0.5, 0, 1) * (0.3 + 0.7 * opacity)
        shaded = color[:, :, None, None] * (0.5 + 0.5 * shade[:, None])
        pixels += coverage[:, None] * (shaded - pixels)


@functools.cache
def _digits() -> Floats:
    return sklearn.digits()[0]


@functools.cache
def _photos() -> tuple[Floats, ...]:
    """Both photographs at full, half and quarter size, `[3, H, W]` in 0..1."""
    pyramid = []
    for photo in sklearn.sample_photos():
        for step in (1, 2, 4):
            height, width = photo.shape[0] // step, photo.shape[1] // step
            tiles = photo[: height * step, : width * step].reshape(height, step, width, step, 3) / np.float32(255)
            pyramid.append(np.ascontiguousarray(tiles.mean((1, 3)).transpose(2, 0, 1), dtype=np.float32))
    return tuple(pyramid)


# The data set.


class Scenes(Dataset[tuple[torch.Tensor, int]]):
    """Scenes with their truth attached; `scenes[i]` is a uint8 image `[3, 64, 64]` and its given label.

    All n images are rendered on first use and kept. Ask for `.images` before handing the scenes to a `DataLoader` with
    workers, or every worker renders its own copy.
    """

    classes = CLASSES

    def __init__(self, params: SceneParams) -> None:
        self.params = params

    def __len__(self) -> int:
        return len(self.params)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index].clone(), int(self.params.labels[index])  # a copy: the cache stays as rendered

    @functools.cached_property
    def _rendered(self) -> dict[str, torch.Tensor]:
        rendered = render(self.params)
        return {name: torch.from_numpy(array) for name, array in vars(rendered).items()}

    @property
    def images(self) -> torch.Tensor:
        """uint8 `[n, 3, 64, 64]`."""
        return self._rendered["images"]

    @property
    def masks(self) -> torch.Tensor:
        """Visible pixels of the first and the second object, bool `[n, 2, 64, 64]`."""
        return self._rendered["object_masks"]

    @property
    def parts(self) -> torch.Tensor:
        """0 for none, else 1 + index into `PART_NAMES`, uint8 `[n, 64, 64]`."""
        return self._rendered["part_map"]

    @property
    def watermark_masks(self) -> torch.Tensor:
        """Box of the watermark, bool `[n, 64, 64]`."""
        return self._rendered["watermark_mask"]

    @property
    def labels(self) -> torch.Tensor:
        """The given labels `[n]`."""
        return torch.from_numpy(self.params.labels)

    @property
    def true_labels(self) -> torch.Tensor:
        """Class of the first object `[n]`."""
        return torch.from_numpy(self.params.objects[:, 0])

    @property
    def second_labels(self) -> torch.Tensor:
        """Class of the second object, -1 without one, `[n]`."""
        return torch.from_numpy(np.where(self.params.n_objects == 2, self.params.objects[:, 1], -1))

    @property
    def mislabelled(self) -> torch.Tensor:
        """Where the given label is wrong, bool `[n]`."""
        return torch.from_numpy(self.params.mislabelled)


def demo_scenes(
    n: int,
    seed: int = 0,
    *,
    two_object: float = 0.0,
    watermark: float = 0.0,
    mislabelled: float = 0.0,
    backdoor: float = 0.0,
) -> Scenes:
    """n labelled scenes with masks, parts and attributes; see `sample` for the options."""
    return Scenes(
        sample(n, seed, two_object=two_object, watermark=watermark, mislabelled=mislabelled, backdoor=backdoor)
    )
