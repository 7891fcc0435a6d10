"""Pictures of any kind, read into model inputs.

A path, a `PIL.Image` and a `uint8` array or tensor are pictures and go through the spec's preprocessing. A *float
tensor* `[C, H, W]` or `[N, C, H, W]` is a model input already and is taken as it is, as in Captum.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput
from torchloupe_core.spec import Preprocess, Spec, resize_and_normalise

__all__ = [
    "SUFFIXES",
    "Pixels",
    "data_uri",
    "find",
    "finite",
    "open_picture",
    "read",
    "read_one",
    "read_pixels",
    "require_pictures",
]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

OUTSIDE = 0.5 / 255  # of [0, 1], that rounding may have led


@dataclass(frozen=True)
class Pixels:
    """Images `[N, C, H, W]` as pixels in [0, 1], of any size."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)


def read_pixels(
    images: Any, spec: Spec, *, device: torch.device, dtype: torch.dtype, longest: int | None = None
) -> Pixels:
    """Images at their own size, not preprocessed: pictures as they are, model inputs (float tensors) turned back.

    longest: pixels of the longer side to scale them to. Raises `BadInput`, naming the image.
    """
    if isinstance(images, Tensor) and images.is_floating_point():
        inputs = images[None] if images.ndim == 3 else images
        _check(inputs, spec, sized=False)
        require_pictures(inputs, spec)
        values = spec.pixels(inputs.detach())
    else:
        parts = [_picture_pixels(image, name, spec) for name, image in _named(images)]
        if not parts:
            raise BadInput("no images were given")
        if len(shapes := {tuple(part.shape) for part in parts}) > 1:
            raise BadInput(f"the images have different sizes, {sorted(shapes)}; give them one by one, or resize them")
        values = torch.stack(parts)
    if longest is not None:
        values = scaled(values, longest)
    with torch.inference_mode(False):
        return Pixels(values.to(device, dtype, copy=True))


def require_pictures(inputs: Tensor, spec: Spec) -> None:
    """Raises `BadInput` for model inputs `[N, C, H, W]` that no picture gives, whose pixels are outside [0, 1]."""
    low, high = inputs.amin((2, 3)), inputs.amax((2, 3))  # [N, C]
    known = spec.mean is not None and spec.std is not None
    if spec.mean is not None and spec.std is not None:
        mean, std = inputs.new_tensor(spec.mean), inputs.new_tensor(spec.std)
        low, high = low * std + mean, high * std + mean
    if bool((low < -OUTSIDE).any() or (high > 1 + OUTSIDE).any()):
        raise BadInput(
            f"as pixels these model inputs go from {low.min().item():.3g} to {high.max().item():.3g}, which is no "
            "picture in [0, 1]; "
            + (
                "normalise them as the model's spec does, or give uint8 pictures"
                if known
                else "the model's mean and std are not known: tl.wrap(module, mean=, std=)"
            )
        )


def read(images: Any, spec: Spec, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Images as model inputs `[N, C, H, W]`, never the caller's own tensor. Raises `BadInput`, naming the image."""
    if isinstance(images, Tensor) and images.is_floating_point():
        inputs = images[None] if images.ndim == 3 else images
    else:
        parts = [_one(image, name, spec) for name, image in _named(images)]
        if not parts:
            raise BadInput("no images were given")
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1:
            raise BadInput(f"the images have different sizes after preprocessing, {sorted(shapes)}; resize them alike")
        inputs = torch.stack(parts)
    _check(inputs, spec)
    with torch.inference_mode(False):  # or a caller inside it gets inputs that no gradient can be asked for
        return inputs.detach().to(device, dtype, copy=True)


def read_one(image: Any, spec: Spec, name: str) -> Tensor:
    """One image as a model input `[C, H, W]` on the CPU, in its own precision. Raises `BadInput`, calling it `name`."""
    inputs = _one(image, name, spec)[None]
    _check(inputs, spec, [name])
    with torch.inference_mode(False):
        return inputs[0].detach().to("cpu", copy=True)


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: one sum, and a look at each only if that is neither."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return bool(values.sum(dtype=wide).isfinite()) or bool(values.isfinite().all())


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """A picture file, decoded, turned upright, in 8-bit RGB or grayscale. Raises `BadInput` naming the file."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path} is a folder, not an image")
    try:
        with Image.open(path) as image:
            image.load()
            return _eight_bit(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise BadInput(f"no such image file: {path}") from None
    except UnidentifiedImageError:
        size = path.stat().st_size
        raise BadInput(f"{path} is not an image" if size else f"{path} is empty (0 bytes)") from None
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} cannot be decoded: {error}") from error


def find(folder: str | os.PathLike[str]) -> list[Path]:
    """The picture files in a folder and its subfolders, in sorted order. Raises `BadInput` if there are none."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise BadInput(f"no images in {folder}; looked for {', '.join(SUFFIXES)}")
    return files


def _named(images: Any) -> Iterator[tuple[str, Any]]:
    """Each single image with a name for messages."""
    if isinstance(images, (str, os.PathLike)):
        paths = find(images) if Path(images).is_dir() else [Path(images)]
        yield from ((str(path), path) for path in paths)
    elif isinstance(images, (Image.Image, np.ndarray, Tensor)):
        several = list(images) if not isinstance(images, Image.Image) and images.ndim == 4 else [images]
        yield from ((f"image {index}", image) for index, image in enumerate(several))
    elif isinstance(images, Iterable):
        for index, image in enumerate(images):
            yield (str(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"), image
    else:
        raise BadInput(f"an image is a path, a PIL image, a uint8 array or a tensor; got {type(images).__name__}")


def _one(image: Any, name: str, spec: Spec) -> Tensor:
    if isinstance(image, Tensor) and image.is_floating_point():
        return image
    picture = _picture(image, name)
    prepared = _preprocess(spec)(picture if spec.channels == 1 else picture.convert("RGB"))
    if not isinstance(prepared, Tensor) or prepared.ndim != 3:
        got = list(prepared.shape) if isinstance(prepared, Tensor) else type(prepared).__name__
        raise BadInput(f"preprocess must turn a picture into a tensor [C, H, W]; it gave {got}")
    return prepared.detach()


def _picture_pixels(image: Any, name: str, spec: Spec) -> Tensor:
    """`[C, H, W]` in [0, 1]: a picture with as many channels as the model takes, three unless known."""
    if isinstance(image, Tensor) and image.is_floating_point():
        raise BadInput(f"{name} is a model input among pictures; give float tensors as one tensor [N, C, H, W]")
    if spec.channels not in (None, 1, 3):
        raise BadInput(f"the model takes {spec.channels} channels, a picture has 3; give model inputs as float tensors")
    picture = _picture(image, name).convert("L" if spec.channels == 1 else "RGB")
    values = torch.from_numpy(np.array(picture))
    values = values[:, :, None] if values.ndim == 2 else values
    return values.permute(2, 0, 1).float() / 255


def scaled(values: Tensor, longest: int) -> Tensor:
    """Pixels `[N, C, H, W]` in [0, 1] with a longer side of so many."""
    if longest < 1:
        raise BadInput(f"size is at least 1 pixel; got {longest}")
    height, width = values.shape[2:]
    factor = longest / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    if size == (height, width):
        return values
    return F.interpolate(values, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def _picture(image: Any, name: str) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        return open_picture(image)
    if isinstance(image, Image.Image):
        try:
            image.load()  # one opened from a file is decoded only now
        except (OSError, SyntaxError, ValueError) as error:
            raise BadInput(f"{name} cannot be decoded: {error}") from error
        return _eight_bit(image)
    if isinstance(image, Tensor):
        array = image.cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array  # tensors are [C, H, W], arrays [H, W, C]
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise BadInput(f"{name} is {type(image).__name__}; an image is a path, a PIL image, a uint8 array or a tensor")
    if array.dtype != np.uint8:
        raise BadInput(f"{name} is an array of {array.dtype}; a picture is uint8, a model input a float torch tensor")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise BadInput(f"{name} has shape {list(image.shape)}; a picture is [H, W, 3] as array or [3, H, W] as tensor")
    return _eight_bit(Image.fromarray(array))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any PIL mode as 8-bit RGB or L: transparency over white, 16-bit and float pictures scaled to their range."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0 if values.max(initial=0) > 1 else 1.0
        return Image.fromarray((np.nan_to_num(values).clip(0, top) * (255 / top) + 0.5).astype(np.uint8))
    return image.convert("L" if image.mode == "1" else "RGB")


def _preprocess(spec: Spec) -> Preprocess:
    if spec.preprocess is not None:
        return spec.preprocess
    if spec.input_size is None:
        raise BadInput(
            "this model's input size is not known, so pictures cannot be resized for it; "
            "tl.wrap(module, input_size=(3, H, W)) or preprocess=, or give a float tensor"
        )
    return resize_and_normalise(spec.input_size, spec.mean, spec.std)


def _check(inputs: Tensor, spec: Spec, names: Sequence[str] | None = None, *, sized: bool = True) -> None:
    if inputs.ndim != 4 or 0 in inputs.shape:
        raise BadInput(f"model inputs are [N, C, H, W] with at least one image; got {list(inputs.shape)}")
    if spec.channels is not None and inputs.shape[1] != spec.channels:
        raise BadInput(f"the model takes {spec.channels} channels; the images have {inputs.shape[1]}")
    if sized and spec.fixed_size and spec.input_size is not None and tuple(inputs.shape[1:]) != spec.input_size:
        raise BadInput(f"the model takes inputs of {list(spec.input_size)} only; got {list(inputs.shape[1:])}")
    if not finite(inputs):
        bad = (~inputs.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        raise BadInput(f"the input holds NaN or infinity, in {names[bad[0]] if names else _numbered(bad)}")


def _numbered(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return f"image {shown}" if len(indices) == 1 else f"images {shown}"


def data_uri(picture: Tensor, *, quality: int | None = None) -> str:
    """A picture `[3, H, W]`, uint8 or in [0, 1], as the text of a PNG for a page; of a WebP if a quality is given."""
    if picture.is_floating_point():
        picture = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    kind, options = ("png", {}) if quality is None else ("webp", {"quality": quality})
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
