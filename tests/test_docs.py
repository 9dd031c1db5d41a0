"""Run every code block of the documentation in its page's order: Python in one namespace, shell in one folder.

A block of another language ("text", "json") shows output. A page's blocks must not depend on another page's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("docs/*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = {"text", "json"}


def script(page: Path) -> str:
    """Return the page's blocks as one Python program, with the page's line numbers."""
    text = page.read_text()
    lines = ["import subprocess as _subprocess, os as _os"]
    for found in BLOCK.finditer(text):
        language, code = found.groups()
        if language in SHOWN:
            continue
        assert language in ("python", "sh"), f"{page.name}: a block of {language!r} is neither run nor shown"
        line = text[: found.start()].count("\n") + 2
        if language == "sh":
            code = f"_subprocess.run({code!r}, shell=True, check=True, executable='/bin/bash')"
        lines += ["\n" * max(0, line - len("\n".join(lines).split("\n")) - 2), code]
    return "\n".join(lines)


@pytest.mark.parametrize("name", [p for p in PAGES if BLOCK.search((ROOT / p).read_text())])
def test_the_code_of_the_page_runs(name, tmp_path):
    program = tmp_path / Path(name).with_suffix(".py").name.replace("-", "_")
    program.write_text(script(ROOT / name))
    scripts = Path(sys.executable).parent  # where `attnfx` is
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "ATTNFX_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_index_names_every_page():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert listed == {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
