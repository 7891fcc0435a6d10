"""The command, and folders of pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command import Run, invoke, picture
from PIL import Image


@pytest.fixture(scope="session")
def run() -> Run:
    return invoke


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three good pictures: a.png, b.jpg and sub/c.jpg."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.jpg", "sub/c.jpg")):
        picture(seed).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def odd_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of every kind, some of them no pictures."""
    folder = tmp_path_factory.mktemp("odd")
    for name in ("a", "b"):
        (folder / name).mkdir()
        picture(ord(name)).save(folder / name / "x.jpg")
    picture(1).save(folder / "x.jpg")
    picture(2).save(folder / "x.png")
    picture(3).convert("RGBA").save(folder / "rgba.png")
    picture(4).convert("CMYK").save(folder / "cmyk.jpg")
    picture(5).convert("L").save(folder / "gray.png")
    Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40).save(folder / "deep.png")
    picture(6, 1, 1).save(folder / "dot.png")
    picture(7).save(folder / "a photo, naïve (1).webp")
    whole = (folder / "x.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no picture")
    return folder
