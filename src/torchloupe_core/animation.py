"""A run as a moving picture: GIF by Pillow, MP4 by ffmpeg where it is installed."""

from __future__ import annotations

import io
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.results import write_whole

__all__ = ["animated", "tiled"]

GAP, WHITE, LEAST = 2, 1.0, 128  # pixels between images; of the shorter side of an image, below which it is enlarged
LAST = 10  # how many times the last frame is shown


def animated(frames: Sequence[Tensor], path: str | os.PathLike[str], *, fps: float) -> Path:
    """Writes frames `[n, 3, H, W]` in [0, 1], the n images side by side, as `.gif` or `.mp4`; returns where.

    Raises `MissingDependency` for `.mp4` without ffmpeg.
    """
    target = Path(path)
    if target.suffix not in (".gif", ".mp4"):
        raise BadInput(f"an animation is a .gif or an .mp4 file; got {target.name!r}")
    if not 0 < fps <= 100:
        raise BadInput(f"fps is above 0 and at most 100; got {fps}")
    pictures = [_picture(tiled(frame)) for frame in frames]
    pictures += pictures[-1:] * LAST
    write_whole(target, _gif(pictures, fps) if target.suffix == ".gif" else _mp4(pictures, fps))
    return target


def tiled(images: Tensor) -> Tensor:
    """`[3, H, W]`: images `[n, 3, h, w]` in rows and columns on white; small ones enlarged by a whole factor."""
    factor = math.ceil(LEAST / min(images.shape[2:]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    columns = math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    padded = F.pad(images, (0, GAP, 0, GAP, 0, 0, 0, missing), value=WHITE)
    rows = padded.view(-1, columns, *padded.shape[1:]).permute(2, 0, 3, 1, 4)  # [3, rows, h, columns, w]
    return rows.reshape(3, rows.shape[1] * rows.shape[2], -1)[:, :-GAP, :-GAP]


def _picture(image: Tensor) -> Image.Image:
    values = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


def _gif(pictures: Sequence[Image.Image], fps: float) -> bytes:
    buffer = io.BytesIO()
    first, *rest = (one.quantize(256, dither=Image.Dither.NONE) for one in pictures)
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def _mp4(pictures: Sequence[Image.Image], fps: float) -> bytes:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise MissingDependency("ffmpeg is not installed, which makes .mp4 files; write a .gif instead, or install it")
    with tempfile.TemporaryDirectory() as folder:
        for number, picture in enumerate(pictures):
            even = picture.crop((0, 0, picture.width - picture.width % 2, picture.height - picture.height % 2))
            even.save(Path(folder) / f"{number:05d}.png")
        made = Path(folder) / "made.mp4"
        frames = ["-framerate", str(fps), "-i", str(Path(folder) / "%05d.png")]
        command = [ffmpeg, "-loglevel", "error", *frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BadInput(f"ffmpeg fails: {(done.stderr.strip().splitlines() or ['it does not say why'])[-1]}")
        return made.read_bytes()
