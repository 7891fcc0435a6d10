"""Ctrl-C where Python drops it."""

from __future__ import annotations

import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from torchloupe.cli_interrupt import interruptible


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A shell's background jobs inherit a deaf ear."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Picture:
    pass


def drops(raised: BaseException, after: float = 0) -> None:
    """Raises it where no exception leaves, after some seconds of work there."""

    def callback(_: object) -> None:
        works(after)
        raise raised

    picture = Picture()
    watched = weakref.ref(picture, callback)
    del picture
    assert watched() is None


def works(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)


def test_an_interrupt_that_python_drops_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        drops(KeyboardInterrupt())
        works(10)


def test_it_may_be_dropped_several_times() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        drops(KeyboardInterrupt())
        begun = time.monotonic()
        drops(SystemExit(), after=10)  # not raised: the interrupt is, in there
        assert time.monotonic() - begun < 5
        works(10)


def test_nothing_is_raised_once_the_work_is_over() -> None:
    with interruptible():
        drops(KeyboardInterrupt())
    works(0.1)


def test_other_exceptions_are_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    hook: Callable[[sys.UnraisableHookArgs], None] = lambda dropped: told.append(dropped.exc_type)  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", hook)
    with interruptible():
        drops(ValueError())
        works(0.1)
    assert told == [ValueError] and sys.unraisablehook is hook
