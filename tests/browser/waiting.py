"""Waiting for what a page does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(true: Callable[[], Any], seconds: float = 20) -> None:
    """Waits for it; asked from outside, as the page's own policy forbids what `wait_for_function` does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
