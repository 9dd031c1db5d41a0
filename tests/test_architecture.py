"""Who may import whom, where import-linter's contracts (pyproject.toml) cannot say it, and what the links must keep."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def names_used(source: str) -> Iterator[str]:
    """Dotted names of the modules, and of the attributes of modules, that the source imports or reaches by a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the package's full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from names_used(ast.unparse(node))


def is_fx(name: str) -> bool:
    return f"{name}.".startswith("torch.fx.")


def stands_alone(name: str) -> bool:
    """Whether the spec and the expression IR may import this name: the standard library and each other."""
    return name.split(".")[0] in sys.stdlib_module_names or f"{name}.".startswith(("attnfx.ir.", "attnfx.spec."))


def sources(*where: str) -> list[Path]:
    return sorted(file for place in where for file in ([*(ROOT / place).rglob("*.py")] or [ROOT / place]))


@pytest.mark.parametrize("file", sources("attnfx/kernels"), ids=lambda file: str(file.relative_to(ROOT)))
def test_kernels_know_no_fx(file):
    assert [name for name in names_used(file.read_text()) if is_fx(name)] == []


@pytest.mark.parametrize(
    "file", sources("attnfx/ir", "attnfx/spec/attention.py"), ids=lambda file: str(file.relative_to(ROOT))
)
def test_the_spec_and_the_ir_import_only_the_standard_library_and_each_other(file):
    assert [name for name in imports(file.read_text()) if not stands_alone(name)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.fx",
        "from torch import fx",
        "from torch.fx import Graph",
        "import torch.fx.node as n",
        "torch.fx.Node",
    ],
)
def test_every_way_to_reach_fx_is_seen(source):
    assert any(map(is_fx, names_used(source)))


@pytest.mark.parametrize("source", ["import torch", "from attnfx import errors", "import attnfx", "import irregular"])
def test_every_way_to_lean_on_others_is_seen(source):
    assert not all(map(stands_alone, imports(source)))


def test_the_folders_are_packages_of_attnfx_and_not_top_level_modules():
    code = "import attnfx.passes, attnfx.kernels, importlib.util as u; assert u.find_spec('passes') is None"
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True)
    assert not any(Path(entry or ".").resolve() == ROOT for entry in sys.path), "the root hides packages from the tests"


def test_transformers_works_from_the_root_where_our_folder_shadows_its_kernels_package():
    code = "import transformers; transformers.LlamaConfig(); transformers.LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
