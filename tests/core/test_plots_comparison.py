"""The drawings of a comparison: names that can be read, colours that mean one thing."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch

from many_methods import FLOORS, METHODS, comparison
from torchloupe_core.comparison import Comparison
from torchloupe_core.plots_comparison import overlays


@pytest.fixture(scope="module")
def found() -> Comparison:
    return comparison()


def drawn(found: Comparison, kind: str) -> Any:
    figure = found.figure(kind=kind)
    figure.draw_without_rendering()
    return figure


def test_names_lie_beside_their_points_and_not_on_one_another(found: Comparison) -> None:
    seconds = found.cost_seconds.clone()
    seconds[METHODS.index("grad_cam.grad_cam_elementwise")] = 2.0  # a long name at the right end
    figure = drawn(replace(found, cost_seconds=seconds), "cost")
    names = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}
    assert set(names) == set(METHODS)
    assert not any(one.overlaps(other) for one, other in combinations(names.values(), 2))
    assert all(box.x1 <= figure.bbox.x1 for box in names.values())


@pytest.mark.parametrize("kind", ["agreement", "bars", "maps"])
def test_names_and_titles_lie_inside_the_drawing(found: Comparison, kind: str) -> None:
    figure = drawn(found, kind)
    box = figure.get_tightbbox()  # inches
    assert min(box.x0, box.y0) >= -0.005
    assert box.x1 <= figure.get_figwidth() + 0.005 and box.y1 <= figure.get_figheight() + 0.005


def test_maps_tell_their_targets_and_methods(found: Comparison) -> None:
    axes = drawn(found, "maps").axes
    labels = [one.yaxis.label for one in axes[:: len(found) + 1]]
    told = [one.get_text().replace("\n", " ") for one in labels]
    assert told == list(found.targets[: len(found.images)])
    assert not any(one.get_window_extent().overlaps(other.get_window_extent()) for one, other in pairwise(labels))
    titles = [one.get_title().replace("\n", "") for one in axes[: len(found) + 1]]
    assert titles == ["image", *METHODS, *FLOORS]


def test_a_method_has_one_kind_of_colours_over_grey(found: Comparison) -> None:
    maps = found.maps.clone()
    maps[0] = 0.0
    maps[0, 0, 0, 0] = -1.0  # signed, though in one image alone
    drawn = overlays(replace(found, maps=maps))
    grey = found.images.mean(1, keepdim=True).expand_as(found.images)
    assert drawn.shape == (len(found), *found.images.shape)
    torch.testing.assert_close(drawn[0, 1:], grey[1:])  # where a signed map is zero, nothing is drawn over the image
    assert not torch.allclose(drawn[1, 1:], grey[1:], atol=0.05)
