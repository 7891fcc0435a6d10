"""The demo page: one file that fetches nothing and says what was measured."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from PIL import Image

from torchloupe import _demo
from torchloupe._demo import METHODS, write_demo
from torchloupe_core.errors import BadInput, StoreError


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo") / "made" / "here"
    path = write_demo(folder, count=6, progress=False)
    assert path == folder / "index.html"
    assert [one.name for one in folder.iterdir()] == ["index.html"]
    return path.read_text()


def test_it_fetches_nothing(page: str) -> None:
    written = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.findall(r"//|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")", written)
    assert set(re.findall(r'src="([^:]*):', page)) == {"data"}
    assert "<script" not in page


def test_its_pictures_are_pictures(page: str, tmp_path: Path) -> None:
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) > 6 * (1 + len(METHODS))
    for number, text in enumerate(pictures):
        path = tmp_path / f"{number}.png"
        path.write_bytes(base64.b64decode(text))
        with Image.open(path) as image:
            assert image.size == (64, 64)


def test_it_measures_six_methods_against_two_baselines(page: str) -> None:
    table = page.split('class="scores"')[1].split("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr")[2:]]
    names = [row[0] for row in rows]
    assert [name.removeprefix("captum.") for name in names] == [*METHODS, "random", "centre blob"]
    numbers = {row[0]: [float(value) for value in row[1:4]] for row in rows}
    assert all(0 <= value <= 1 for values in numbers.values() for value in values)
    assert numbers["captum.integrated_gradients"][0] > numbers["random"][0]


def test_the_backdoor_is_found(page: str) -> None:
    share = re.search(r"(\d+)% of (\d+) scenes turn into mushrooms", page)
    assert share is not None
    assert int(share[1]) >= 80
    assert "mushroom, " in page.split("The backdoor, found")[1]


def test_what_cannot_be_done_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo, "explain", lambda *_, **__: pytest.fail("work began"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write into"):
        write_demo(tmp_path / "file" / "out")
    with pytest.raises(BadInput, match="at least 6 scenes"):
        write_demo(tmp_path / "out", count=5)
    assert not (tmp_path / "out").exists()
