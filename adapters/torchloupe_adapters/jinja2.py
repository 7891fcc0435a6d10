"""Jinja2: self-contained pages from a template and plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchloupe_core.errors import MissingDependency
from torchloupe_core.registry import method

__all__ = ["render"]


@method("render", "jinja2.render", cost="no forward")
def render(template: Path, **values: Any) -> str:
    """The page a template file makes of the values; every value is escaped, every one it names must be given."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependency.of("jinja2", None) from error
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
