"""The page of an embedding: what is in the file, without a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded import embedding
from PIL import Image

from torchloupe_core.embedding import Embedding
from torchloupe_core.errors import BadInput, StoreError


def block(page: str, name: str) -> str:
    (found,) = re.findall(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.DOTALL)
    return str(found)


def array(page: str, name: str, kind: str) -> Any:
    return np.frombuffer(base64.b64decode(block(page, name)), dtype=kind)


@pytest.fixture
def found() -> Embedding:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(30, 2, generator=generator) * torch.tensor([4.0, 1.0])
    pictures = (
        torch.randint(0, 255, (30, 3, 1, 1), generator=generator, dtype=torch.uint8).expand(30, 3, 32, 32).clone()
    )
    names = tuple(f"/photos/{'ant' if n % 2 else 'bee'}/{n}.jpg" for n in range(30))
    labels = torch.arange(30) % 3 - 1
    return embedding(points, labels=labels, classes=("ant", "bee"), names=names, pictures=pictures)


def test_points_columns_names_and_pictures_are_all_there(found: Embedding, tmp_path: Path) -> None:
    loss = [None if n == 4 else n / 10 for n in range(30)]
    path = found.html(tmp_path / "page", columns={"loss": loss, "kind": ["x", "y", "x"] * 10})
    assert path == tmp_path / "page.html"
    page = path.read_text()
    facts = json.loads(block(page, "facts"))
    places = array(page, "points", "<u2").reshape(30, 2) / 65535
    reach = (found.points.amax(0) - found.points.amin(0)).max().item()
    np.testing.assert_allclose(places, (found.points - found.points.amin(0)).numpy() / reach, atol=1e-4)
    assert facts["span"] == pytest.approx(places.max(0), abs=1e-4)
    assert [one["title"] for one in facts["columns"]] == ["label", "loss", "kind"]
    assert array(page, "column-0", "<u2").tolist() == [65535 if n % 3 == 0 else n % 3 - 1 for n in range(30)]
    np.testing.assert_allclose(array(page, "column-1", "<f4"), [np.nan if one is None else one for one in loss])
    assert facts["columns"][2]["kinds"] == ["x", "y"] and facts["columns"][1]["ends"] == pytest.approx([0, 2.9])
    assert json.loads(block(page, "names"))[:2] == ["bee/0.jpg", "ant/1.jpg"]
    sheets = facts["sheets"]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(block(page, "sheet-0")))))
    assert found.pictures is not None and sheets["size"] == 32
    for n in range(30):
        row, column = divmod(n, sheets["across"])
        middle = sheet[row * 32 + 16, column * 32 + 16].astype(int)
        assert np.abs(middle - found.pictures[n, :, 0, 0].numpy()).max() < 24


def test_the_file_asks_for_nothing_and_says_so_to_the_browser(found: Embedding, tmp_path: Path) -> None:
    page = found.html(tmp_path / "page.html").read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not re.findall(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)


def test_names_cannot_end_the_script_they_are_in(found: Embedding, tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script>"
    named = embedding(found.points, names=(bad,) * 30, labels=torch.zeros(30).long(), classes=(bad,))
    page = named.html(tmp_path / "page.html", columns={bad: range(30)}, pictures=False, title=bad).read_text()
    assert "alert(1)<" not in page and "<script>alert" not in page
    assert json.loads(block(page, "facts"))["columns"][0]["kinds"] == [bad]


@pytest.mark.parametrize(("budget", "size", "some"), [(16.0, 32, False), (0.009, 16, False), (0.0005, 16, True)])
def test_pictures_keep_to_their_budget(found: Embedding, tmp_path: Path, budget: float, size: int, some: bool) -> None:
    noisy = torch.randint(0, 255, (30, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    page = embedding(found.points, pictures=noisy).html(tmp_path / "page.html", budget=budget).read_text()
    facts = json.loads(block(page, "facts"))["sheets"]
    texts = re.findall(r'id="sheet-\d+">(.*?)</script>', page, re.DOTALL)
    assert facts["size"] == size and facts["rows"] == some
    assert sum(map(len, texts)) <= 1.5 * budget * 1e6
    if some:
        rows = array(page, "rows", "<u4")
        assert 0 < len(rows) < 30 and f"pictures of {len(rows)} of 30 images, drawn at random" in page
        assert (np.diff(rows.astype(int)) > 0).all()


def test_without_pictures_labels_or_files(tmp_path: Path) -> None:
    found = embedding(torch.rand(5, 2), indices=torch.tensor([3, 4, 8, 9, 11]))
    page = found.html(tmp_path / "page.html", pictures=False).read_text()
    facts = json.loads(block(page, "facts"))
    assert facts["columns"] == [] and facts["sheets"]["size"] == 0
    assert json.loads(block(page, "names")) == [3, 4, 8, 9, 11]


def test_points_on_a_line_and_a_single_one(tmp_path: Path) -> None:
    line = torch.stack([torch.zeros(4), torch.arange(4.0)], 1)
    page = embedding(line).html(tmp_path / "line.html", pictures=False).read_text()
    assert json.loads(block(page, "facts"))["span"] == [0.01, 1.0]
    page = embedding(torch.ones(1, 2)).html(tmp_path / "one.html", pictures=False).read_text()
    assert array(page, "points", "<u2").tolist() == [0, 0]


def test_bad_input_is_said_before_anything_is_written(found: Embedding, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="two dimensions; this embedding has 3"):
        embedding(torch.rand(5, 3)).html(tmp_path / "page.html")
    with pytest.raises(BadInput, match="column 'loss' has one value"):
        found.html(tmp_path / "page.html", columns={"loss": [1.0]})
    with pytest.raises(BadInput, match="megabytes pictures may take; got 0"):
        found.html(tmp_path / "page.html", budget=0)
    with pytest.raises(BadInput, match="not at hand"):
        embedding(found.points).html(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        found.html(tmp_path / "file" / "page.html")
