"""Shortcuts: found where there is one, named with what they do, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput
from torchloupe_core.methods.recurring import recurring, windows

QUICK: dict[str, Any] = {"steps": 4, "progress": False}


@pytest.fixture(scope="module")
def marked() -> Any:
    return tl.demo_scenes(100, seed=21, watermark=0.3)


@pytest.fixture(scope="module")
def found(marked: Any) -> tl.Audit:
    return tl.audit("demo/backdoored", marked.images, **QUICK)


def test_windows_hold_most_of_what_is_positive() -> None:
    maps = torch.zeros(2, 12, 10)
    maps[0, 3:6, 4:7], maps[0, 9:, 0] = 1.0, -5.0
    maps[1, 11, 9] = 2.0
    assert windows(maps, 3).tolist()[0] == [3, 4]
    top, left = windows(maps, 3).tolist()[1]
    assert top == 9 and left == 7


def test_what_is_pasted_into_images_recurs_in_them() -> None:
    generator = torch.Generator().manual_seed(0)
    images, maps = torch.rand(30, 3, 40, 40, generator=generator), torch.zeros(30, 40, 40)
    pattern = torch.rand(3, 9, 9, generator=generator)
    corners = torch.randint(0, 31, (30, 2), generator=generator)
    for row, (y, x) in enumerate(corners.tolist()):
        if row < 12:
            images[row, :, y : y + 9, x : x + 9] = pattern
        maps[row, y : y + 9, x : x + 9] = 1.0
        shifted = (y + 2, x - 1) if 2 <= y <= 28 and x >= 1 else (y, x)  # maps point a little beside
        maps[row] = 0
        maps[row, shifted[0] : shifted[0] + 9, shifted[1] : shifted[1] + 9] = 1.0
    (region,) = recurring(images, maps, 9, alike=0.7, least=5)
    assert len(region.members) >= 10 and (region.members < 12).all()
    exact = [
        (torch.tensor(box[:2]) - corners[member]).abs().max().item()
        for member, box in zip(region.members.tolist(), region.boxes.tolist(), strict=True)
    ]
    assert max(exact) <= 2 and len(set(map(str, region.boxes.tolist()))) > 5  # all the same part, wherever it lies
    assert list(recurring(images, maps, 9, alike=0.7, least=13)) == []


def test_a_planted_watermark_is_named(found: tl.Audit, marked: Any) -> None:
    assert found.classes == ("mushroom",) and len(found) == 1 and found.looked_at == 100
    (members,) = found.members
    with_mark = marked.watermark_masks.flatten(1).any(1)
    assert with_mark[list(members)].all() and len(members) >= 0.8 * with_mark.sum()
    assert found.transplanted[0] >= 0.9 and found.covered[0] >= 0.5 and found.control[0] <= 0.3
    for member, (top, left, bottom, right) in zip(members, found.boxes[0].tolist(), strict=False):
        mask = marked.watermark_masks[member]
        assert mask[top:bottom, left:right].sum() >= 0.7 * mask.sum()
    torch.testing.assert_close(found.pictures[0, 0], marked.images[members[0]].float() / 255)


def test_what_is_said_saved_and_drawn(found: tl.Audit, tmp_path: Path) -> None:
    text = found.table()
    assert text.startswith(f"mushroom: a region recurs in {len(found.members[0])} images (") and "pasted into" in text
    again = tl.open(found.save(tmp_path / "found"))
    assert isinstance(again, tl.Audit) and again.table() == text and torch.equal(again.boxes, found.boxes)
    figure, axes = again.plot()
    assert axes.shape == (1, 1 + found.pictures.shape[1]) and "mushroom" in axes[0][0].get_title(loc="left")
    assert figure is not None


@pytest.mark.parametrize("watermark", [0.0, 0.3])
def test_a_clean_model_takes_no_shortcut(watermark: float) -> None:
    """A mark that recurs is none where it decides nothing."""
    found = tl.audit("demo", tl.demo_scenes(60, seed=21, watermark=watermark).images, **QUICK)
    assert len(found) == 0 and found.table().startswith("no shortcut in 60 images")
    assert found._repr_png_()[:4] == b"\x89PNG"


def test_a_region_on_the_object_is_no_shortcut(marked: Any) -> None:
    everywhere = torch.ones(100, 64, 64, dtype=torch.bool)
    assert len(tl.audit("demo/backdoored", marked.images, masks=everywhere, **QUICK)) == 0
    on_mark = tl.audit("demo/backdoored", marked.images, masks=marked.masks[:, 0], **QUICK)
    assert on_mark.classes == ("mushroom",) and on_mark.inside[0] < 0.2


def test_nothing_is_left_behind(marked: Any, tmp_path: Path) -> None:
    model = tl.load("demo/backdoored")
    before = Snapshot(model.module)
    found = tl.audit(model, marked.images[:12], images=8, **QUICK)
    assert found.looked_at == 8 and before.differences() == []
    with pytest.raises(BadInput, match="has no option 'stepp'"):
        tl.audit(model, marked.images[:12], stepp=3)
    for wrong, problem in (
        ({"images": 2}, "images is at least 5"),
        ({"width": 40}, "width is from 3 pixels"),
        ({"share": 0}, "share above 0"),
    ):
        with pytest.raises(BadInput, match=problem):
            tl.audit(model, marked.images[:12], **wrong)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match="none of the 1 images could be read"):
        tl.audit(model, tmp_path)
    assert before.differences() == []
