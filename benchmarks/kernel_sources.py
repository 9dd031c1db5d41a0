"""Hash the sources of the flash kernels' machine code, to find out whether the cost model's table is up to date."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from attnfx.cost.instruction_counts import TABLE

KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "flash"
# The kernels and the tile functions that they call. Score programs are generated, so their part is counted separately.
SOURCES = (
    "triton/forward.py", "triton/backward.py", "triton/backward_keys.py", "triton/backward_rows.py", "triton/decode.py",
    "host/tiles.py",
)  # fmt: skip
HELPERS = "triton/functions.py"


def fingerprint(folder: Path = KERNELS) -> str:
    """Hash the sources of the machine code: the kernels' syntax trees without docstrings, and the tile tables."""
    trees = {name: ast.parse((folder / name).read_text(encoding="utf-8")) for name in (*SOURCES, HELPERS)}
    helpers = {n.name: n for n in trees.pop(HELPERS).body if isinstance(n, ast.FunctionDef)}
    parts = [n for tree in trees.values() for n in tree.body if isinstance(n, (ast.FunctionDef, ast.Assign))]
    kernels = [n for n in parts if isinstance(n, ast.Assign) or n.decorator_list]
    todo, used = list(kernels), {}
    while todo:
        for n in ast.walk(todo.pop()):
            name = n.attr if isinstance(n, ast.Attribute) else n.id if isinstance(n, ast.Name) else ""
            if name in helpers and name not in used:
                used[name] = helpers[name]
                todo.append(helpers[name])
    texts = [_text(n) for n in (*kernels, *(used[name] for name in sorted(used)))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _text(node: Any) -> str:
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


def recorded() -> str:
    """Return the fingerprint of the kernels from which the table was generated."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["fingerprint"]
