"""The exact search: against a loop in double precision, where single precision misleads, and at its edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchloupe_core import nearest
from torchloupe_core.errors import BadInput
from torchloupe_core.nearest import Metric, Nearest, apart, norms


def loop(query: Any, vectors: Any, metric: str, left_out: int = -1) -> list[tuple[float, int]]:
    """Every vector by distance, then number, one after another in double precision."""
    found = []
    query = np.asarray(query, dtype=np.float64)
    for number, vector in enumerate(np.asarray(vectors, dtype=np.float64)):
        if number == left_out:
            continue
        if metric == "l2":
            distance = float(np.sqrt(np.sum((query - vector) ** 2)))
        else:
            lengths = float(np.linalg.norm(query) * np.linalg.norm(vector))
            distance = 1 - float(query @ vector) / lengths if lengths else 1.0
        found.append((distance, number))
    return sorted(found)


def searched(queries: Tensor, vectors: Tensor, k: int, metric: Metric, left_out: Tensor | None = None) -> Any:
    search = Nearest(queries, k, metric, left_out)
    search.update(vectors, torch.arange(len(vectors)))
    return search.compute()


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(("count", "dims", "k"), [(1, 1, 1), (3, 2, 3), (200, 17, 5), (1000, 64, 10)])
def test_as_a_loop(metric: Metric, count: int, dims: int, k: int) -> None:
    generator = torch.Generator().manual_seed(count)
    vectors, queries = torch.randn(count, dims, generator=generator), torch.randn(7, dims, generator=generator)
    numbers, distances = searched(queries, vectors, k, metric)
    assert distances.dtype == torch.float64 and numbers.shape == distances.shape == (7, k)
    for row, query in enumerate(queries):
        expected = loop(query, vectors, metric)[:k]
        assert numbers[row].tolist() == [number for _, number in expected]
        np.testing.assert_allclose(distances[row], [distance for distance, _ in expected], atol=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_where_single_precision_cannot_tell(metric: Metric) -> None:
    """Vectors far from zero that differ in their last bits: float32 products say little of their order."""
    generator = torch.Generator().manual_seed(0)
    vectors = 100 + 1e-3 * torch.randn(500, 256, generator=generator)
    queries = 100 + 1e-3 * torch.randn(4, 256, generator=generator)
    numbers, _ = searched(queries, vectors, 10, metric)
    rough = (2 * queries @ vectors.T - vectors.square().sum(1)).topk(10).indices
    for row, query in enumerate(queries):
        exact = apart(query[None], vectors, torch.zeros(500).long(), torch.arange(500), metric)
        assert numbers[row].tolist() == exact.argsort(stable=True)[:10].tolist()
    assert not torch.equal(rough, numbers)  # the case is one


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_equal_vectors_rank_by_number_and_are_at_distance_zero(metric: Metric) -> None:
    vectors = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    numbers, distances = searched(vectors[:5], vectors, 12, metric)
    assert numbers.tolist() == [[row + 5 * turn for turn in range(12)] for row in range(5)]
    assert (distances == 0).all()


def test_the_order_and_size_of_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors, queries = torch.randn(300, 20, generator=generator).repeat(2, 1), torch.randn(30, 20, generator=generator)
    whole = searched(queries, vectors, 9, "l2")
    search, order = Nearest(queries, 9, "l2"), torch.randperm(600, generator=generator)
    for part in torch.split(order, 47):
        search.update(vectors[part], part)
    assert all(torch.equal(a, b) for a, b in zip(whole, search.compute(), strict=True))
    monkeypatch.setattr(nearest, "SCORES", 64)
    monkeypatch.setattr(nearest, "QUERIES", 8)
    monkeypatch.setattr(nearest, "REFINED", 100)
    assert all(torch.equal(a, b) for a, b in zip(whole, searched(queries, vectors, 9, "l2"), strict=True))


def test_one_left_out_for_each_query() -> None:
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    own = torch.tensor([3, -1, 49])
    numbers, _ = searched(vectors[[3, 3, 49]], vectors, 5, "cosine", own)
    for row, (query, left_out) in enumerate(zip((3, 3, 49), own.tolist(), strict=True)):
        assert numbers[row].tolist() == [number for _, number in loop(vectors[query], vectors, "cosine", left_out)[:5]]
    assert numbers[1, 0] == 3


def test_fewer_vectors_than_asked_for() -> None:
    vectors = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    assert searched(vectors[:2], vectors, 9, "l2")[0].shape == (2, 4)
    assert searched(vectors[:2], vectors, 9, "l2", torch.tensor([0, -1]))[0].shape == (2, 3)
    assert searched(vectors[:1], vectors[:1], 9, "l2", torch.tensor([0]))[0].shape == (1, 0)


def test_vectors_of_zeros_have_cosine_zero() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    numbers, distances = searched(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), vectors, 3, "cosine")
    assert numbers.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert distances.tolist() == [[0, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_very_small_and_very_large_numbers(metric: Metric, size: float) -> None:
    generator = torch.Generator().manual_seed(4)
    vectors, queries = size * torch.randn(60, 9, generator=generator), size * torch.randn(3, 9, generator=generator)
    numbers, distances = searched(queries, vectors, 4, metric)
    assert distances.isfinite().all()
    for row, query in enumerate(queries):
        assert numbers[row].tolist() == [number for _, number in loop(query, vectors, metric)[:4]]


def test_many_dimensions() -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = torch.rand(40, nearest.LONG + 1, generator=generator)
    numbers, _ = searched(vectors[:2], vectors, 3, "cosine")
    assert [row.tolist() for row in numbers] == [
        [number for _, number in loop(vectors[one], vectors, "cosine")[:3]] for one in range(2)
    ]


def test_products_in_bfloat16_are_not_used() -> None:
    """Where the caller allows torch to multiply in half precision the answer stays exact."""
    generator = torch.Generator().manual_seed(6)
    vectors, queries = torch.randn(400, 64, generator=generator), torch.randn(300, 64, generator=generator)
    before = torch.get_float32_matmul_precision()
    expected = searched(queries, vectors, 10, "cosine")
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(searched(queries, vectors, 10, "cosine")[0], expected[0])
    finally:
        torch.set_float32_matmul_precision(before)


def test_norms_are_those_of_double_precision() -> None:
    vectors = torch.randn(1000, 30, generator=torch.Generator().manual_seed(7)) * 1e-20
    np.testing.assert_allclose(norms(vectors), np.linalg.norm(vectors.double().numpy(), axis=1), rtol=1e-14)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match='metric is "cosine" or "l2"; got \'l1\''):
        Nearest(torch.ones(1, 2), 1, "l1")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="k is at least 1; got 0"):
        Nearest(torch.ones(1, 2), 0)
