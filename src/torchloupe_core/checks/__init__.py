"""The contract: what every method and every model promises, as checks anyone can run on their own.

`check_method` and `check_source` run them all; `checks_of` names them one by one, for a test runner:

    @pytest.mark.parametrize("check", checks_of("explain").values())
    def test_smiles(check): check(Trial(find("explain", "mine.smiles"), handle, inputs, explain))

A broken promise is an `AssertionError` that says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchloupe_core import registry
from torchloupe_core.checks import explain as _explain
from torchloupe_core.checks import source as _source
from torchloupe_core.checks.trial import Explain, Source, Trial, random_inputs
from torchloupe_core.errors import UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.registry import Method

__all__ = ["Explain", "Source", "Trial", "check_method", "check_source", "checks_of", "random_inputs"]

_TABLES: dict[str, Mapping[str, Callable[[Any], None]]] = {"explain": _explain.CHECKS, "source": _source.CHECKS}


def checks_of(subject: str) -> dict[str, Callable[[Any], None]]:
    """The checks by name: of a verb's methods, each taking a `Trial`, or of a "source", each taking a `Source`."""
    if subject not in _TABLES:
        raise UnknownName.of("contract", subject, _TABLES)
    return dict(_TABLES[subject])


def check_method(
    method: str | Method,
    handle: Handle,
    inputs: Tensor | None = None,
    *,
    explain: Explain,
    verb: str = "explain",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Runs every check of a method on a model. Raises `AssertionError` naming each promise that is broken.

    inputs: a float batch `[N, C, H, W]` of at least two images, noise without it. explain: the verb's function.
    options: given to it in every run, small ones for costly methods. A method not registered is so meanwhile.
    """
    entry = registry.find(verb, method) if isinstance(method, str) else method
    batch = random_inputs(handle) if inputs is None else inputs
    trial = Trial(entry, handle, batch, explain, options or {})
    _run(checks_of(verb), trial)


def check_source(handle: Handle, inputs: Tensor | None = None, *, explain: Explain) -> None:
    """Runs every check of a model. Raises `AssertionError` naming each promise that is broken."""
    source = Source(handle, random_inputs(handle) if inputs is None else inputs, explain)
    with handle.borrow():  # once for all checks
        _run(checks_of("source"), source)


def _run(checks: Mapping[str, Callable[[Any], None]], subject: Trial | Source) -> None:
    broken: list[str] = []
    first: Exception | None = None
    for name, check in checks.items():
        try:
            check(subject)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            broken.append(f"{name}: {kind}{error}")
            first = first or error
    if broken:
        raise AssertionError("\n".join(broken)) from first
