"""What points are coloured by: kinds or a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from torchloupe_core.columns import column, labels_column
from torchloupe_core.errors import BadInput


@pytest.mark.parametrize(
    ("given", "kinds", "codes"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([True, False, None], ("False", "True"), [1, 0, -1]),
        ([10, 9, None], ("9", "10"), [1, 0, -1]),
        (torch.tensor([2, 2, 5]), ("2", "5"), [0, 0, 1]),
        (np.array(["x", "y", "x"]), ("x", "y"), [0, 1, 0]),
        ([1, "1", 2.5], ("1", "2.5"), [0, 0, 1]),
    ],
)
def test_kinds(given: Any, kinds: tuple[str, ...], codes: list[int]) -> None:
    found = column("what", given, 3)
    assert found.kinds == kinds and found.codes.tolist() == codes and found.title == "what"


def test_scales() -> None:
    found = column("loss", [0.5, None, float("inf"), 2.0, -1.0], 5)
    assert found.kinds is None and found.ends == (-1.0, 2.0)
    assert found.values.isnan().tolist() == [False, True, True, False, False]
    assert column("n", torch.arange(21), 21).kinds is None  # too many to tell apart
    assert column("n", torch.arange(20), 20).kinds is not None
    assert column("empty", [float("nan")] * 2, 2).ends == (0.0, 1.0)


@pytest.mark.parametrize("given", [[1.0, 2.0], torch.ones(3, 2), torch.ones(0)])
def test_one_value_for_each_point(given: Any) -> None:
    with pytest.raises(BadInput, match=r"column 'x' has one value for each of the 3 points; got \["):
        column("x", given, 3)


def test_labels_that_occur_by_class_name() -> None:
    found = labels_column(torch.tensor([4, -1, 0, 4]), ("a", "b", "c"))
    assert found.kinds == ("a", "4") and found.codes.tolist() == [1, -1, 0, 1]
    with pytest.raises(BadInput, match="no labels; give by="):
        labels_column(torch.tensor([-1, -1]), None)


def test_rare_kinds_are_put_together() -> None:
    found, others = column("x", [*"aaabbccd", None], 9).frequent(3)
    assert found.kinds == ("a", "b", "2 others") and others == 2
    assert found.codes.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, -1]
    whole = column("x", [*"abc"], 3)
    assert whole.frequent(3) == (whole, 0)
