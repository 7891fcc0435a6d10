"""Jinja2: self-contained pages from a template and plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchloupe_core
from torchloupe_core.errors import MissingDependency
from torchloupe_core.registry import method

__all__ = ["render"]

PAGES = Path(torchloupe_core.__path__[0]) / "pages"


@method("render", "jinja2.render", cost="no forward")
def render(template: Path, **values: Any) -> str:
    """The page a template file makes of the values; every value is escaped, every one it names must be given.

    It may name other templates, of its own folder or of core's: `base.html` is what all pages have in common.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependency.of("jinja2", None) from error
    environment = Environment(
        loader=FileSystemLoader([template.parent, PAGES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
