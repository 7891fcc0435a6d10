"""The public names, and what importing them costs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchloupe as tl

ROOT = Path(__file__).parent.parent.parent
ECOSYSTEMS = {
    "captum",
    "timm",
    "torchvision",
    "lucent",
    "umap",
    "sklearn",
    "skimage",
    "scipy",
    "openTSNE",
    "pynndescent",
    "jinja2",
    "matplotlib",
    "cv2",
    "tqdm",
    "click",
}


def loaded_after(code: str) -> set[str]:
    """The top-level packages in a fresh interpreter after some code."""
    paths = [str(ROOT / folder) for folder in ("src", "adapters", "recipes")]
    script = (
        f"import sys; sys.path[:0] = {paths!r}\n{code}\n"
        "import json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *before, last = done.stdout.splitlines()
    assert before == []
    assert done.stderr == ""
    return set(json.loads(last))


def test_all_is_sorted_complete_and_resolves() -> None:
    assert tl.__all__ == sorted(tl.__all__)
    assert len(tl.__all__) == len(set(tl.__all__))
    assert set(tl.__all__) == set(tl._HOMES)
    for name in tl.__all__:
        assert getattr(tl, name) is not None, name
        assert name in dir(tl)
    stable = {"load", "wrap", "explain", "methods", "open", "logit", "prob", "margin", "layer", "channel", "neuron"}
    assert stable | {"direction", "interpolate", "demo_scenes", "errors", "Handle", "Attribution"} <= set(tl.__all__)


def test_type_checkers_see_the_same_names() -> None:
    import ast

    tree = ast.parse(Path(tl.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == set(tl.__all__)


@pytest.mark.parametrize("package", ["torchloupe_core", "torchloupe_adapters", "torchloupe"])
def test_every_module_states_its_names(package: str) -> None:
    home = Path(importlib.import_module(package).__file__ or "").parent
    for path in sorted(home.rglob("*.py")):
        name = ".".join([package, *path.relative_to(home).with_suffix("").parts]).removesuffix(".__init__")
        module = importlib.import_module(name)
        names = getattr(module, "__all__", [])
        assert len(names) == len(set(names)), name
        for one in names:
            assert hasattr(module, one), f"{name}.{one}"
    assert (home / "py.typed").is_file()


def test_an_unknown_attribute_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'torchloupe' has no attribute 'expalin'"):
        _ = tl.expalin  # type: ignore[attr-defined]


def test_importing_the_package_loads_no_ecosystem_and_not_even_torch() -> None:
    loaded = loaded_after("import torchloupe")
    assert loaded & (ECOSYSTEMS | {"torch", "numpy", "PIL"}) == set()
    assert "torchloupe" in loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", ["tl.load, tl.wrap, tl.explain, tl.open, tl.methods, tl.Handle", "tl.logit(3), tl.errors"]
)
def test_the_verbs_load_no_ecosystem(names: str) -> None:
    loaded = loaded_after(f"import torchloupe as tl\n{names}")
    # torch itself may import packages of these; ours must not add to what it brings.
    assert loaded & ECOSYSTEMS - loaded_after("import torch") == set()
    assert "torch" in loaded


@pytest.mark.slow
def test_explaining_a_module_of_ones_own_loads_what_it_needs_only() -> None:
    loaded = loaded_after(
        "import torch, torchloupe as tl\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),"
        " torch.nn.Flatten(), torch.nn.Linear(4, 2))\n"
        "tl.explain(tl.wrap(net, input_size=(3, 8, 8)), torch.zeros(1, 3, 8, 8) + torch.rand(8), method='grad_cam')"
    )
    assert loaded & {"captum", "sklearn", "skimage", "matplotlib", "lucent", "umap", "timm", "torchvision"} == set()


@pytest.mark.slow
def test_a_result_is_opened_and_segmented_in_a_fresh_interpreter(tmp_path: Path) -> None:
    """Who opens a result need not have asked for it: the methods of results are known then too."""
    x = torch.rand(1, 3, 64, 64)
    path = tl.explain(tl.load("demo", pretrained=False), x, target=1).save(tmp_path / "one")
    loaded_after(
        "import sys; sys.modules['cv2'] = None\n"
        f"import torchloupe as tl\nfound = tl.open({str(path)!r})\n"
        "try:\n    found.segment()\nexcept tl.errors.MissingDependency:\n    pass"
    )


def test_the_table_of_methods_prints() -> None:
    table = tl.methods()
    text = str(table)
    lines = text.split("\n")
    assert lines[0].split() == ["verb", "name", "backend", "needs", "cost", "paper"]
    assert len(lines) == len(table) + 1
    assert repr(table) == text
    for entry in table:
        for field in ("verb", "name", "backend", "needs", "cost", "paper"):
            assert hasattr(entry, field)
    html: Any = table._repr_html_()
    assert html.count("<tr>") == len(table) + 1
    assert {entry.verb for entry in tl.methods("explain")} == {"explain"}
    assert list(tl.methods("nonsense")) == []


def test_errors_are_a_module_of_the_front_door() -> None:
    """`from torchloupe.errors import BadTarget` is how users catch them, and it is the same class."""
    import torchloupe.errors as front
    from torchloupe_core import errors as core

    assert tl.errors is front
    assert set(front.__all__) == set(core.__all__)
    for name in front.__all__:
        assert getattr(front, name) is getattr(core, name)
        assert issubclass(getattr(front, name), front.LoupeError)
