"""The page of suspicious labels in a browser: sorted, marked, kept and written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from torchloupe_core.dataset import open_data
from torchloupe_core.spec import Spec
from torchloupe_core.suspects import Suspects

N = 12


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images; by the loss the last is most suspicious, by the other scores the first."""
    colours = torch.linspace(0, 1, N)[:, None, None, None].expand(N, 3, 16, 16)
    rising = torch.arange(N).float()
    found = Suspects(
        method="clean",
        backend="native",
        seed=0,
        seconds=0.0,
        forwards=0,
        versions={},
        options={},
        scores=torch.stack([rising, -rising, -rising, -rising]),
        indices=torch.arange(N),
        labels=torch.arange(N) % 3,
        predictions=torch.arange(N) % 2,
        confidences=torch.full((N,), 0.75),
        k=5,
        classes=("ant", "bee", 'cat, "large"'),
        data=open_data(colours, Spec(name="none")),
    )
    return found.html(tmp_path_factory.mktemp("page") / "suspects.html", title="Suspects")


def names(page: Any) -> list[str]:
    return [one.strip("\u200e") for one in page.locator("article .name").all_inner_texts()]


def test_cards_are_sorted_by_what_is_chosen(show: Any, page: Path) -> None:
    shown = show(page)
    assert names(shown.page) == [f"image {n}" for n in range(N)]
    shown.page.select_option("#by", "loss")
    assert names(shown.page) == [f"image {n}" for n in reversed(range(N))]
    assert shown.page.locator("article").first.locator(".bar.sorted").count() == 1
    shown.page.select_option("#class", "bee")
    assert names(shown.page) == [f"image {n}" for n in (10, 7, 4, 1)]
    text = shown.page.locator("article").first.inner_text()
    assert "bee" in text and "sees ant 75 %" in text
    assert shown.asked == [page.as_uri()] and shown.said == []  # nothing from elsewhere, no complaint


def test_pictures_are_those_of_their_cards(show: Any, page: Path) -> None:
    shown = show(page)
    box = shown.page.locator("article .picture").nth(9).bounding_box()
    clip = {"x": box["x"] + 30, "y": box["y"] + 30, "width": 20, "height": 20}
    import io

    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(shown.page.screenshot(clip=clip))).convert("RGB"))
    assert abs(pixels.mean() - 255 * 9 / (N - 1)) < 6  # the grey of image 9


def test_marks_by_key_and_button_are_counted_kept_and_written_out(show: Any, page: Path, tmp_path: Path) -> None:
    shown = show(page, accept_downloads=True)
    first = shown.page.locator("article").first
    first.focus()
    for key in ("w", "w", "f", "w", "ArrowLeft", "u"):
        shown.page.keyboard.press(key)
    assert shown.page.inner_text("#count") == "2 wrong, 1 fine"
    shown.page.locator("article").nth(5).locator(".to-fine").click()
    assert shown.page.inner_text("#count") == "2 wrong, 2 fine"
    shown.page.select_option("#show", "wrong")
    assert names(shown.page) == ["image 0", "image 1"]
    with shown.page.expect_download() as download:
        shown.page.click("#list")
    path = tmp_path / "labels.csv"
    download.value.save_as(path)
    lines = path.read_text().splitlines()
    assert lines[0] == "index,name,label,mark,seen,probability" and len(lines) == 5
    assert lines[3] == '2,"image 2","cat, ""large""",fine,"ant",0.75'
    shown.page.reload()
    assert shown.page.inner_text("#count") == "2 wrong, 2 fine"
