"""Running the command in this process, and pictures for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from torchloupe.cli import main

Run = Callable[..., Result]


def invoke(*arguments: object) -> Result:
    """`torchloupe ARGUMENTS`; an exception that would be a traceback fails the test."""
    return CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
