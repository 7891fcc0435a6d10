"""Ctrl-C that is heard wherever it falls."""

from __future__ import annotations

import _thread
import contextlib
import sys
import threading
from collections.abc import Iterator

__all__ = ["interruptible"]

AGAIN = 0.01  # seconds, by when Python has left where it dropped the interrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises a `KeyboardInterrupt` again that Python dropped.

    No exception leaves a finaliser or the callback of a weak reference, and matplotlib has many of those: without this
    some are lost while pictures are drawn.
    """
    before, due = sys.unraisablehook, None

    def raise_again() -> None:
        nonlocal due
        due = None
        _thread.interrupt_main()

    def heard(dropped: sys.UnraisableHookArgs) -> None:
        nonlocal due
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
        elif due is None:
            due = threading.Timer(AGAIN, raise_again)
            due.start()

    sys.unraisablehook = heard
    try:
        yield
    finally:
        sys.unraisablehook = before
        if due is not None:
            due.cancel()
