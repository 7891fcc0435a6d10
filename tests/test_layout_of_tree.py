"""The import rule: recipes -> adapters -> core, one file for each ecosystem, one file with hooks."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STOREYS = {
    "torchloupe_core": ROOT / "src" / "torchloupe_core",
    "torchloupe_adapters": ROOT / "adapters" / "torchloupe_adapters",
    "torchloupe": ROOT / "recipes" / "torchloupe",
}
MAY_IMPORT = {
    "torchloupe_core": {"torchloupe_core"},
    "torchloupe_adapters": {"torchloupe_core", "torchloupe_adapters"},
    "torchloupe": {"torchloupe_core", "torchloupe_adapters", "torchloupe"},
}
EVERYWHERE = {"torch", "numpy", "PIL"}
# Each ecosystem and the one file that imports it; where a second file may, the reason.
HOMES = {
    "captum": {
        f"torchloupe_adapters/captum/{name}.py" for name in ("asked", "influence", "lrp", "metrics", "surrogate")
    },
    "dattri": {"torchloupe_adapters/dattri.py"},
    "kronfluence": {"torchloupe_adapters/kronfluence.py"},
    "timm": {"torchloupe_adapters/timm.py"},
    "huggingface_hub": {"torchloupe_adapters/timm.py"},  # which fetches timm's weights
    "torchvision": {"torchloupe_adapters/torchvision.py"},
    "sklearn": {"torchloupe_adapters/sklearn.py"},
    "skimage": {"torchloupe_adapters/skimage.py"},
    "lucent": {"torchloupe_adapters/lucent.py"},
    "cv2": {"torchloupe_adapters/opencv.py"},
    "umap": {"torchloupe_adapters/umap.py"},
    "openTSNE": {"torchloupe_adapters/opentsne.py"},
    "pynndescent": {"torchloupe_adapters/pynndescent.py"},
    "pytorch_grad_cam": {"torchloupe_adapters/grad_cam.py"},
    "torchcam": {"torchloupe_adapters/torchcam.py"},
    "zennit": {"torchloupe_adapters/zennit.py"},
    "quantus": {"torchloupe_adapters/quantus/asked.py"},
    "lime": {"torchloupe_adapters/lime.py"},
    "shap": {"torchloupe_adapters/shap.py"},
    "scipy": {"torchloupe_adapters/scipy.py"},
    "tqdm": {"torchloupe_adapters/tqdm.py"},
    "safetensors": {"torchloupe_adapters/checkpoint.py"},
    "lancedb": {"torchloupe_adapters/lancedb.py"},
    "pyarrow": {"torchloupe_adapters/lancedb.py"},  # its tables
    "ray": {"torchloupe_adapters/ray.py"},
    "jinja2": {"torchloupe_adapters/jinja2.py"},
    "pandas": {"torchloupe_adapters/pandas.py"},
    "click": {
        "torchloupe/cli.py",
        "torchloupe/cli_compare.py",
        "torchloupe/cli_embedding.py",
        "torchloupe/cli_images.py",
        "torchloupe/cli_influence.py",
        "torchloupe/cli_looking.py",
        "torchloupe/cli_options.py",
        "torchloupe/cli_scan.py",
        "torchloupe/cli_making.py",
        "torchloupe_adapters/demo/train.py",
    },  # each a command of its own
    "matplotlib": {"torchloupe_core/plots.py"},
}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    inside: bool
    for_types: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def files(storey: str) -> list[Path]:
    return sorted(STOREYS[storey].rglob("*.py"))


def label(path: Path) -> str:
    return next(f"{path.relative_to(folder.parent)}" for folder in STOREYS.values() if path.is_relative_to(folder))


def imports_of(path: Path, source: str | None = None) -> Iterator[Import]:
    """Every import of a file, those inside functions and those for type checkers too."""
    package = [*path.parent.relative_to(next(f for f in STOREYS.values() if path.is_relative_to(f)).parent).parts]

    def walk(node: ast.AST, inside: bool, for_types: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [".".join([*base, *([node.module] if node.module else [])])]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        for name in names:
            yield Import(label(path), getattr(node, "lineno", 0), name, inside, for_types)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = for_types or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, for_types)

    yield from walk(ast.parse(source if source is not None else path.read_text(encoding="utf-8")), False, False)


def all_imports(storey: str) -> list[Import]:
    return [one for path in files(storey) for one in imports_of(path)]


@pytest.mark.parametrize("storey", STOREYS)
def test_no_storey_imports_one_above_it(storey: str) -> None:
    found = all_imports(storey)
    assert found
    wrong = [str(one) for one in found if one.top in STOREYS and one.top not in MAY_IMPORT[storey]]
    assert wrong == []


@pytest.mark.parametrize("storey", STOREYS)
def test_only_known_packages_are_imported(storey: str) -> None:
    allowed = sys.stdlib_module_names | EVERYWHERE | set(STOREYS) | set(HOMES)
    assert [str(one) for one in all_imports(storey) if one.top not in allowed] == []


def test_core_imports_torch_numpy_pillow_and_the_standard_library_only() -> None:
    allowed = sys.stdlib_module_names | EVERYWHERE | {"torchloupe_core"}
    outside = [one for one in all_imports("torchloupe_core") if one.top not in allowed]
    assert {one.top for one in outside} <= {"matplotlib"}
    for one in outside:
        assert one.for_types or (one.file == "torchloupe_core/plots.py" and one.inside), str(one)


@pytest.mark.parametrize("ecosystem", HOMES)
def test_each_ecosystem_is_imported_in_its_own_file_only(ecosystem: str) -> None:
    importing = {
        one.file for storey in STOREYS for one in all_imports(storey) if one.top == ecosystem and not one.for_types
    }
    assert importing <= HOMES[ecosystem], f"{ecosystem} is imported in {sorted(importing)}"
    assert importing, f"nothing imports {ecosystem}; take it off the list"


def test_ecosystems_are_imported_on_use() -> None:
    """At a module's top only by modules that are that ecosystem's own commands."""
    heavy = set(HOMES) - {"click"}
    at_the_top = [
        str(one)
        for storey in STOREYS
        for one in all_imports(storey)
        if one.top in heavy and not one.inside and not one.for_types
    ]
    assert at_the_top == []


def test_one_file_registers_hooks() -> None:
    registering = {
        label(path)
        for storey in STOREYS
        for path in files(storey)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and node.attr.endswith("hook")
    }
    assert registering == {"torchloupe_core/watch.py"}


def test_models_are_never_run_backward_into_their_own_gradients() -> None:
    """`torch.autograd.grad`, never `.backward()`; the recipe that trains the demo models is the exception."""
    backward = {
        label(path)
        for storey in STOREYS
        for path in files(storey)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    }
    assert backward <= {"torchloupe_adapters/demo/train.py"}


def test_the_reader_sees_every_kind_of_import() -> None:
    path = STOREYS["torchloupe_core"] / "methods" / "cam.py"
    source = (
        "import a.b, c\nfrom d.e import f\nfrom . import g\nfrom ..h import i\n"
        "def j():\n    import k\n    importlib.import_module('l.m')\n"
        "class n:\n    def o(self):\n        from p import q\n"
        "if TYPE_CHECKING:\n    from r import s\n"
        "try:\n    import t\nexcept ImportError:\n    pass\n"
    )
    found = {(one.module, one.inside, one.for_types) for one in imports_of(path, source)}
    assert found == {
        ("a.b", False, False),
        ("c", False, False),
        ("d.e", False, False),
        ("torchloupe_core.methods", False, False),
        ("torchloupe_core.h", False, False),
        ("k", True, False),
        ("l.m", True, False),
        ("p", True, False),
        ("r", False, True),
        ("t", False, False),
    }


def test_no_two_test_files_share_a_name() -> None:
    """Or pytest, which imports them by name, refuses to run both."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
