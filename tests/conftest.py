"""One thread for all tests: tiny models gain nothing from more, and lose much on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import torchloupe_adapters  # noqa: F401  (says where methods live, whichever tests run)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"left torch with {left} threads; some libraries change them for the process (kept_threads)"
