"""tqdm: progress on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from torchloupe_core.errors import MissingDependency

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(
    title: str, unit: str, show: bool | None = None, *, delay: float = 0.5
) -> Iterator[Callable[[int, int], None]]:
    """A function `(done, total)` that draws a bar; on a terminal only, unless told to or not to.

    delay: seconds before it appears; with 0 it is there before the first step is done.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda done, total: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependency.of("tqdm", None) from error
    with tqdm(desc=title, unit=unit, leave=False, delay=delay) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
