"""tqdm: progress on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from torchloupe_core.errors import MissingDependency

__all__ = ["Report", "progress_bar"]


class Report(Protocol):
    """Told how much of the work is done, and in a few words how it stands."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress_bar(title: str, unit: str, show: bool | None = None, *, delay: float = 0.5) -> Iterator[Report]:
    """A function `(done, total, note)` that draws a bar; on a terminal only, unless told to or not to.

    delay: seconds before it appears; with 0 it is there before the first step is done.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield _unheard
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependency.of("tqdm", None) from error
    with tqdm(desc=title, unit=unit, leave=False, delay=delay) as bar:

        def advance(done: int, total: int, note: str = "") -> None:
            bar.total = total
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield advance


def _unheard(done: int, total: int, note: str = "") -> None:
    """Progress that nobody looks at."""
