"""The page of a comparison in a browser: sorted, looked at and pointed at; nothing is asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import torchloupe_adapters  # noqa: F401  (says where the templates live)
from many_methods import FLOORS, METHODS, METRICS, comparison

M, K, S = len(METHODS) + len(FLOORS), len(METRICS), 6


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison().html(tmp_path_factory.mktemp("page") / "comparison", title="Twelve <methods>")


def names(page: Any) -> list[str]:
    return [text.split(" ")[0] for text in page.locator("#numbers tbody th").all_inner_texts()]


def head(page: Any, name: str) -> Any:
    return page.locator("#numbers thead button", has_text=name)


def colours(page: Any, one: Any) -> Any:
    """The mean colour `[3]` of the middle of a picture, 0 to 255."""
    one.scroll_into_view_if_needed()
    box = one.bounding_box()
    clip = {"x": box["x"] + 10, "y": box["y"] + 10, "width": box["width"] - 20, "height": box["height"] - 20}
    return np.asarray(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")).mean((0, 1))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_asks_for_nothing_and_complains_of_nothing(show: Any, page: Path, scheme: str) -> None:
    shown = show(page, color_scheme=scheme)
    for name in ("up", "across", "measure", "value"):
        for place in range(shown.page.locator(f"#{name} option").count()):
            shown.page.select_option(f"#{name}", index=place)
    for place in range(shown.page.locator("#numbers thead button").count()):
        shown.page.locator("#numbers thead button").nth(place).click()
    shown.page.set_viewport_size({"width": 500, "height": 700})
    assert [url for url in shown.asked if not url.startswith("data:")] == [page.as_uri()] and shown.said == []
    assert shown.page.inner_text("h1") == "Twelve <methods>" == shown.page.title()


def test_a_click_on_a_heading_sorts_the_best_first(show: Any, page: Path) -> None:
    page = show(page).page
    assert names(page)[-3:] == list(FLOORS)
    head(page, "insertion").click()
    assert names(page) == [*reversed(FLOORS), *reversed(METHODS)]
    assert page.locator("#numbers [aria-sort]").count() == 1
    head(page, "insertion").click()
    assert names(page) == [*METHODS, *FLOORS]
    head(page, "deletion").click()  # lower is better
    assert names(page) == [*METHODS, *FLOORS]
    head(page, "max_sensitivity").click()
    assert names(page)[-1] == "rise"  # which has no value
    head(page, "max_sensitivity").click()
    assert names(page)[-1] == "rise"
    head(page, "method").focus()
    page.keyboard.press("Enter")
    assert names(page) == sorted([*METHODS, *FLOORS])


def test_means_intervals_and_notes_are_told(show: Any, page: Path) -> None:
    page = show(page).page
    best = page.locator("#numbers tbody tr", has_text="sobol").locator("td").nth(1)
    assert "best" in best.get_attribute("class") and page.locator("#numbers .floor .best").count() == 0
    assert not best.locator(".interval").is_visible()
    page.check("#intervals")
    low, high = map(float, best.locator(".interval").inner_text().split(" to "))
    assert low < float(best.inner_text().split()[0]) < high
    strips = [
        str(one.get_attribute("style"))
        for one in page.locator("#numbers tbody tr", has_text="sobol").locator(".strip").all()
    ]
    assert ["--floor:-10" in one for one in strips] == [False] * (K - 1) + [True]  # which has no baselines
    above, below = (float(one.split("--floor:")[1]) for one in strips[:2])
    assert above > 95 and below < 90  # the highest baseline, and the lowest
    text = page.inner_text("body")
    for told in ("Recommended: cam", "captum.lrp: a layer has no rule", "broken.jpg: cannot", "up to scale"):
        assert told in text
    mark = page.locator("#numbers tbody tr", has_text="captum.guided_backprop").locator("sup")
    assert mark.get_attribute("title") == "hardly looks; alike"
    refused = page.locator("#numbers tbody tr", has_text="rise").locator("td").nth(5)
    assert (refused.inner_text(), refused.get_attribute("title")) == ("–", "its maps are random")


def test_cost_against_quality_and_agreement_are_drawn(show: Any, page: Path) -> None:
    page = show(page, viewport={"width": 1280, "height": 800}).page
    page.select_option("#up", label="insertion")
    placed = page.evaluate(
        "[...document.querySelectorAll('#cost circle')].map((one) => [one.cx, one.cy].map((c) => c.baseVal.value))"
    )
    ordered = np.array(sorted(placed))
    assert len(placed) == len(METHODS) and (np.diff(ordered[:, 1]) < 0).all()  # the dearer, the better: the higher up
    page.select_option("#up", label="iou")
    page.select_option("#across", label="forwards")  # all on one line
    boxes = [one.bounding_box() for one in page.locator("#cost text:not(.soft)").all()]
    assert len(boxes) == len(METHODS)
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            apart = abs(one["y"] - other["y"]) > 10
            assert apart or one["x"] > other["x"] + other["width"] or other["x"] > one["x"] + one["width"]
    order = names(page)
    cell = page.locator("#alike tbody tr").nth(order.index("cam")).locator("td").nth(order.index("grad_cam"))
    assert cell.inner_text() == "0.00"
    page.select_option("#measure", label="overlap of the highest tenth")
    assert cell.inner_text() == "-0.25"


def test_pointing_at_a_map_shows_the_image_under_it(show: Any, page: Path) -> None:
    page = show(page).page
    one = page.locator("#maps button").nth(3)
    assert abs(colours(page, one) - [0, 255, 0]).max() > 60
    one.hover()
    page.wait_for_timeout(300)
    assert abs(colours(page, one) - [0, 255, 0]).max() < 1
    page.mouse.move(0, 0)
    one.focus()
    page.wait_for_timeout(300)
    assert abs(colours(page, one) - [0, 255, 0]).max() < 1
    box = one.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(32 / 24, abs=0.02)
    page.locator("#size").fill("12")
    assert one.bounding_box()["width"] == pytest.approx(12 * 16)


def test_below_each_map_stands_its_value(show: Any, page: Path) -> None:
    page = show(page).page
    place = names(page).index("sobol")
    assert page.locator("#maps tbody tr").count() == S
    below = page.locator("#maps tbody tr").nth(2).locator(".value").nth(place)
    assert 11 / M <= float(below.inner_text()) <= 11 / M + 0.05
    assert len({one.inner_text() for one in page.locator(f"#maps td:nth-child({place + 2}) .value").all()}) == S
    page.select_option("#value", label="nothing")
    assert below.inner_text() == ""


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_overflows(show: Any, page: Path, width: int) -> None:
    page = show(page, viewport={"width": width, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for part in ("numbers", "alike", "maps"):
        box = page.locator(f"#{part}").locator("..")
        box.evaluate("one => one.scrollTo(1e5, 0)")
        first = page.locator(f"#{part} tbody th").first.bounding_box()
        assert 0 <= first["x"] < 25 and first["width"] < width / 2.5, part  # the first column stays in sight
    outside = page.evaluate(
        """[...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll")
        && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert outside == []
