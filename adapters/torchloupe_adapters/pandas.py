"""pandas: a result's lines as a data frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchloupe_core.errors import MissingDependency
from torchloupe_core.registry import method

__all__ = ["frame"]


@method("table", "pandas.frame", cost="nothing")
def frame(records: Sequence[dict[str, Any]]) -> Any:
    """Lines of named values as a `pandas.DataFrame`."""
    try:
        import pandas
    except ImportError as error:
        raise MissingDependency.of("pandas", None) from error
    return pandas.DataFrame(list(records))
