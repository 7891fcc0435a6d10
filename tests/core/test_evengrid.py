"""The even grid: the least sum of squared ways there is, one image in each cell."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import embedding
from torch import Tensor

import torchloupe as tl
from torchloupe_core.errors import BadInput
from torchloupe_core.evengrid import Grid


def unit(points: Tensor) -> Tensor:
    low, high = points.amin(0), points.amax(0)
    return (points - low) / (high - low)


@pytest.mark.parametrize("count", [2, 4, 5, 6])
def test_no_other_way_to_place_them_is_shorter(count: int) -> None:
    points = torch.rand(count, 2, generator=torch.Generator().manual_seed(count))
    grid = embedding(points).grid()
    down, across = grid.shape
    assert down * across >= count and abs(down - across) <= 1
    places = unit(points).double()
    centres = torch.tensor([[(c + 0.5) / across, 1 - (r + 0.5) / down] for r in range(down) for c in range(across)])
    ways = torch.cdist(places, centres.double()).square()
    least = min(
        sum(ways[n, cell].item() for n, cell in enumerate(cells))
        for cells in itertools.permutations(range(down * across), count)
    )
    taken = grid.cells[:, 0] * across + grid.cells[:, 1]
    assert ways[torch.arange(count), taken].sum().item() == pytest.approx(least)
    assert grid.diagnostics["moved"] == pytest.approx((least / count) ** 0.5)


def test_points_that_are_a_grid_already_stay_where_they_are() -> None:
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    points = torch.stack([columns.flatten() * 3.0, -2.0 * rows.flatten()], 1)[order]  # the first row is the top one
    grid = embedding(points, indices=100 + order).grid(shape=(4, 5))
    assert grid.table().tolist() == (100 + torch.arange(20)).view(4, 5).tolist()


def test_each_cell_holds_one_image_at_most_and_the_rest_are_empty() -> None:
    grid = embedding(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).repeat(2, 1)).grid(shape=(7, 15))
    assert len(set(map(tuple, grid.cells.tolist()))) == len(grid) == 100
    assert (grid.table() < 0).sum() == 5 and sorted(grid.table()[grid.table() >= 0].tolist()) == list(range(100))


def test_nearer_than_snapping_one_after_another() -> None:
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.1])
    points[100:] += 1.0
    grid = embedding(points).grid(shape=(10, 20))
    places = unit(points)
    centres = torch.tensor([[(c + 0.5) / 20, 1 - (r + 0.5) / 10] for r in range(10) for c in range(20)])
    ways, greedy = torch.cdist(places, centres).square(), 0.0
    for row in range(200):
        greedy += ways[row].min().item()
        ways[:, ways[row].argmin()] = torch.inf
    assert len(grid) * grid.diagnostics["moved"] ** 2 < 0.9 * greedy


def test_of_many_images_some_are_drawn_and_the_result_says_so() -> None:
    found = embedding(torch.randn(90, 2, generator=torch.Generator().manual_seed(2)))
    grid = found.grid(most=40)
    assert len(grid) == 40 and grid.diagnostics["images"] == 40 and grid.diagnostics["of"] == 90
    assert torch.equal(grid.indices, grid.rows) and grid.rows.unique().numel() == 40
    assert torch.equal(found.grid(most=40).cells, grid.cells)
    other = embedding(found.points, seed=1).grid(most=40)
    assert not torch.equal(other.rows, grid.rows)


def test_one_image_and_points_on_a_line() -> None:
    assert embedding(torch.ones(1, 2)).grid().shape == (1, 1)
    line = torch.stack([torch.arange(9.0), torch.zeros(9)], 1)
    assert embedding(line).grid(shape=(1, 9)).table().tolist() == [list(range(9))]


@pytest.mark.parametrize(
    ("dims", "options", "words"),
    [
        (3, {}, "has 3, ask with dims=2"),
        (2, {"most": 0}, "at least 1 image; got most=0"),
        (2, {"shape": (2, 2)}, r"as many cells; got \(2, 2\)"),
        (2, {"shape": (0, 9)}, r"as many cells; got \(0, 9\)"),
    ],
)
def test_bad_input(dims: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        embedding(torch.rand(5, dims)).grid(**options)


def test_it_is_saved_and_opened_with_the_pictures_kept(tmp_path: Path) -> None:
    pictures = torch.randint(0, 255, (6, 3, 8, 8), dtype=torch.uint8)
    grid = embedding(torch.rand(6, 2), pictures=pictures, labels=torch.arange(6), classes=tuple("abcdef")).grid()
    again = tl.open(grid.save(tmp_path / "grid"))
    assert isinstance(again, Grid) and again.shape == grid.shape and torch.equal(again.cells, grid.cells)
    assert torch.equal(again.thumbnails(8), pictures[grid.rows]) and again.classes == tuple("abcdef")
