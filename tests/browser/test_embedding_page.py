"""The page of an embedding in a browser: what is drawn, pointed at, zoomed and coloured; nothing is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waiting import until

import torchloupe_adapters  # noqa: F401  (says where the templates live)
from torchloupe_core.embedding import Embedding

COLOURS = torch.tensor([[230, 20, 20], [20, 200, 20], [20, 20, 230], [230, 200, 20]], dtype=torch.uint8)


def embedding(points: Tensor, labels: Tensor, pictures: Tensor | None) -> Embedding:
    facts: dict[str, Any] = {"method": "umap.umap", "backend": "umap", "seed": 0, "seconds": 0.0, "forwards": 0}
    return Embedding(
        **facts,
        versions={},
        options={},
        points=points,
        labels=labels,
        indices=torch.arange(len(points)),
        names=tuple(f"folder/{n}.png" for n in range(len(points))),
        classes=("ant", "bee", "cat", "<dog>"),
        layer="fc.in",
        pictures=pictures,
    )


@pytest.fixture(scope="module")
def corners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points in the corners of a square and in the middle, each of another class, with a picture of one colour."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]])
    pictures = COLOURS[[0, 1, 2, 3, 0]][:, :, None, None].expand(5, 3, 48, 48).clone()
    found = embedding(points, torch.tensor([0, 1, 2, 3, -1]), pictures)
    columns = {"loss": [0.0, 0.25, 0.5, None, 1.0], "kind": ["x", "y", "x", "y", "x"]}
    return found.html(tmp_path_factory.mktemp("page") / "page.html", columns=columns, title="Five <points>")


def places(page: Any) -> dict[int, tuple[float, float]]:
    """Where on the screen the corners are: in the middle of the stage, as large as fits."""
    box = page.locator("#plot").bounding_box()
    side = 0.94 * min(box["width"], box["height"])
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    units = {0: (0, 1), 1: (1, 1), 2: (0, 0), 3: (1, 0), 4: (0.5, 0.5)}
    return {n: (left + x * side, top + y * side) for n, (x, y) in units.items()}


def frame(page: Any, x: float, y: float) -> list[int]:
    """The colour around the picture of 48 pixels that stands at a point, as there are few of them."""
    return pixel(page, x + 25, y)


def pixel(page: Any, x: float, y: float) -> list[int]:
    """The colour of the plot there."""
    found = page.evaluate(
        """([x, y]) => { const plot = document.getElementById("plot"), box = plot.getBoundingClientRect();
        return [...plot.getContext("2d").getImageData(x - box.left, y - box.top, 1, 1).data]; }""",
        [x, y],
    )
    return list(found)


def picture(page: Any) -> list[int]:
    """The colour of the picture on the card."""
    until(lambda: page.is_visible("#card canvas"))
    found = page.evaluate(
        "[...document.querySelector('#card canvas').getContext('2d').getImageData(64, 64, 1, 1).data]"
    )
    return list(found[:3])


def card(page: Any) -> str:
    return str(page.inner_text("#card")) if page.is_visible("#card") else ""


def test_it_asks_for_nothing_and_complains_of_nothing(show: Any, corners: Path) -> None:
    shown = show(corners)
    page = shown.page
    for key in ("n", "c", "c", "+", "0", "Escape", "ArrowLeft"):
        page.keyboard.press(key)
    page.mouse.move(500, 300)
    page.wait_for_timeout(300)
    assert [url for url in shown.asked if not url.startswith("data:")] == [corners.as_uri()]
    assert shown.said == []
    assert page.inner_text("h1") == "Five <points>" and page.title() == "Five <points>"


def test_points_are_drawn_in_the_colour_of_their_label(show: Any, corners: Path) -> None:
    page = show(corners).page
    facts = json.loads(re.findall(r'id="facts">(.*?)</script>', corners.read_text())[0])
    for n, (x, y) in places(page).items():
        wanted = facts["palette"][n] if n < 4 else facts["unknown"]
        *colour, alpha = frame(page, x, y)
        assert all(abs(a - int(wanted[1 + 2 * i : 3 + 2 * i], 16)) < 6 for i, a in enumerate(colour)), n
        assert alpha > 150
    texts = page.locator("#legend button").all_inner_texts()
    assert [text.split("\n")[0] for text in texts] == ["ant", "bee", "cat", "<dog>", "unknown"]


def test_pointing_at_an_image_shows_it(show: Any, corners: Path) -> None:
    page = show(corners).page
    for n, (x, y) in places(page).items():
        page.mouse.move(x + 3, y - 3)
        until(lambda n=n: card(page).startswith(f"{n}.png"))
        colour = COLOURS[[0, 1, 2, 3, 0][n]].tolist()
        assert all(abs(a - b) < 20 for a, b in zip(picture(page), colour, strict=True))
        label = ["ant", "bee", "cat", "<dog>", "unknown"][n]
        assert card(page).split("\n")[1:4] == [
            f"label: {label}",
            f"loss: {['0', '0.25', '0.5', 'unknown', '1'][n]}",
            f"kind: {'xyxyx'[n]}",
        ]
    x, y = places(page)[4]
    page.mouse.move(x + 60, y)
    until(lambda: card(page) == "")


def test_wheel_drag_and_buttons(show: Any, corners: Path) -> None:
    page = show(corners).page
    x, y = places(page)[3]
    page.mouse.move(x, y)
    for _ in range(3):
        page.mouse.wheel(0, -300)  # what is under the pointer stays there
    page.mouse.move(x + 40, y)
    page.mouse.move(x, y)
    until(lambda: card(page).startswith("3.png"))
    page.mouse.down()
    page.mouse.move(x - 200, y + 150, steps=4)
    page.mouse.up()
    page.mouse.move(x, y)
    until(lambda: card(page) == "")
    page.mouse.move(x - 200, y + 150)
    until(lambda: card(page).startswith("3.png"))
    page.click("#whole")
    page.mouse.move(*places(page)[0])
    until(lambda: card(page).startswith("0.png"))


def test_the_keyboard_alone(show: Any, corners: Path) -> None:
    page = show(corners).page
    page.keyboard.press("n")
    until(lambda: card(page).startswith("4.png"))  # the one in the middle first
    assert "4.png, label: unknown" in page.text_content("#said")
    seen = {page.inner_text("#card b")}
    for _ in range(4):
        page.keyboard.press("n")
        seen.add(page.inner_text("#card b"))
    assert seen == {f"{n}.png" for n in range(5)}
    page.keyboard.press("p")
    page.keyboard.press("Escape")
    until(lambda: card(page) == "")
    x, y = places(page)[4]
    for key, dx, dy in (("ArrowLeft", 60, 0), ("ArrowRight", 0, 0), ("ArrowUp", 0, 60), ("ArrowDown", 0, 0)):
        page.keyboard.press(key)
        page.mouse.move(x + dx, y + dy)
        until(lambda: card(page).startswith("4.png"))
    page.keyboard.press("+")
    page.mouse.move(*places(page)[0])
    until(lambda: card(page) == "")
    page.keyboard.press("0")
    page.mouse.move(places(page)[0][0] + 1, places(page)[0][1])
    until(lambda: card(page).startswith("0.png"))


def test_colours_by_any_column_and_one_kind_alone(show: Any, corners: Path) -> None:
    page = show(corners).page
    at = places(page)
    page.select_option("#column", "loss")
    page.wait_for_timeout(100)
    low, high, unknown = (frame(page, *at[n])[:3] for n in (0, 4, 3))
    assert low[2] > low[1] and high[0] > 200 and high[1] > 200 and len(set(unknown)) <= 3 and min(unknown) > 180
    assert page.inner_text(".ends").split() == ["0", "1"]
    page.keyboard.press("Escape")
    page.focus("#plot")
    page.keyboard.press("c")
    assert page.eval_on_selector("#column", "one => one.value") == "kind"
    page.locator("#legend button").nth(1).click()
    page.wait_for_timeout(100)
    assert frame(page, *at[1])[3] > 150 and frame(page, *at[0])[3] < 60
    page.mouse.move(*at[0])
    until(lambda: card(page) == "")  # hidden kinds are not pointed at
    page.mouse.move(*at[1])
    until(lambda: card(page).startswith("1.png"))


def test_fingers(show: Any, corners: Path) -> None:
    shown = show(corners, viewport={"width": 390, "height": 760}, has_touch=True)
    page = shown.page
    at = places(page)
    page.touchscreen.tap(at[2][0] + 8, at[2][1] + 8)
    page.wait_for_timeout(100)
    until(lambda: card(page).startswith("2.png"))
    client = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        listed = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": listed})

    x, y = at[4]
    touch("touchStart", (x - 20, y), (x + 20, y))
    for spread in (40, 60, 80):
        touch("touchMove", (x - spread, y), (x + spread, y))
    touch("touchEnd")
    page.touchscreen.tap(x, y)
    page.wait_for_timeout(100)
    until(lambda: card(page).startswith("4.png"))  # the middle stayed
    page.touchscreen.tap(at[1][0], at[1][1])
    page.wait_for_timeout(100)
    until(lambda: card(page) == "")  # the corner is out of sight
    assert shown.said == []


def test_pictures_stand_in_for_points_when_few_are_in_sight(show: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2000, 2, generator=generator)
    pictures = COLOURS[torch.arange(2000) % 4][:, :, None, None].expand(2000, 3, 16, 16).clone()
    path = embedding(points, torch.arange(2000) % 4, pictures).html(tmp_path / "page.html")
    page = show(path).page
    page.focus("#plot")
    page.keyboard.press("n")
    name = page.inner_text("#card b")
    for _ in range(14):
        page.keyboard.press("+")
    box = page.locator("#plot").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.wait_for_timeout(500)
    colour = COLOURS[int(name.split(".")[0]) % 4].tolist()
    ways = [pixel(page, x + dx, y + dy)[:3] for dx in range(-40, 41, 8) for dy in range(-40, 41, 8)]
    assert any(all(abs(a - b) < 25 for a, b in zip(one, colour, strict=True)) for one in ways)


def test_of_fifty_thousand_points(show: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    found = embedding(torch.randn(50_000, 2, generator=generator), torch.arange(50_000) % 4, None)
    path = found.html(tmp_path / "page.html", pictures=False, columns={"x": found.points[:, 0]})
    shown = show(path)
    shown.page.keyboard.press("n")
    assert re.match(r"\d+\.png", card(shown.page))
    texts = shown.page.locator("#legend button").all_inner_texts()
    assert sum(int(text.split("\n")[1].replace(",", "")) for text in texts) == 50_000
    assert shown.said == [] and len(shown.asked) == 1
