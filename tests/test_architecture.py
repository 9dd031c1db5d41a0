"""Check imports beyond import-linter's contracts (pyproject.toml), the symbolic links, and the package's data."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parent.parent


def names_used(source: str) -> Iterator[str]:
    """Yield the dotted names of modules and module attributes that the source imports or accesses by a dot."""
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


def modules() -> dict[str, Path]:
    """Return every module of attnfx by name, following the links."""
    found = {}
    for folder, name in (
        (ROOT / "attnfx", "attnfx"),
        (ROOT / "attnfx/passes", "attnfx.passes"),
        (ROOT / "attnfx/kernels", "attnfx.kernels"),
    ):
        for file in folder.rglob("*.py"):
            if folder.name != "attnfx" or file.relative_to(folder).parts[0] not in ("passes", "kernels"):
                parts = file.relative_to(folder).with_suffix("").parts
                found[".".join((name, *parts)).removesuffix(".__init__")] = file
    return found


def imported(source: str, known: Collection[str]) -> set[str]:
    """Return the modules among `known` that a source imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else str(node.module))
    return found & set(known)


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    graph = networkx.DiGraph((a, b) for a, b in edges if a != b)
    return [sorted(c) for c in networkx.strongly_connected_components(graph) if len(c) > 1]


def test_no_files_and_no_folders_import_each_other():
    found = modules()
    edges = [(name, other) for name, file in found.items() for other in imported(file.read_text(), found)]
    assert circles(edges) == []
    for container in {name.rpartition(".")[0] for name in found} - {""}:
        depth = container.count(".") + 2
        inside = [
            (".".join(a.split(".")[:depth]), ".".join(b.split(".")[:depth]))
            for a, b in edges
            if a.startswith(f"{container}.") and b.startswith(f"{container}.")
        ]
        assert circles(inside) == [], container


def test_a_late_import_closes_a_circle_too():
    late = "def run():\n    from attnfx.b import f\n    f()\n"
    assert imported(late, {"attnfx.a", "attnfx.b"}) == {"attnfx.b"}
    assert circles([("attnfx.a", "attnfx.b"), ("attnfx.b", "attnfx.a")]) == [["attnfx.a", "attnfx.b"]]


def test_folders_stay_small():
    flat: dict[Path, int] = {}
    for file in modules().values():
        flat[file.parent] = flat.get(file.parent, 0) + 1
    assert max(flat.values()) <= 16
    assert flat[ROOT / "attnfx"] <= 10


def is_fx(name: str) -> bool:
    return f"{name}.".startswith("torch.fx.")


def stands_alone(name: str) -> bool:
    """Return whether spec and IR may import this name: from the standard library or from each other."""
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


@pytest.mark.slow
def test_transformers_works_from_the_root_where_our_folder_shadows_its_kernels_package():
    code = "import transformers; transformers.LlamaConfig(); transformers.LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_data_file_is_packaged():
    """A wheel contains the files in a package's folder that match a pattern of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools.package-data]")[2].partition("\n[")[0]
    patterns = re.findall(r'^"([\w.]+)" = \[(.*)\]', text, re.MULTILINE)
    named = {
        file
        for package, globs in patterns
        for glob in re.findall(r'"([^"]+)"', globs)
        for file in (ROOT / package.replace(".", "/")).glob(glob)
    }
    data = {f for f in (ROOT / "attnfx").rglob("*.json") if "__pycache__" not in f.parts}
    assert data and data <= named
