"""Run every code block of the documentation in its page's order: Python in one namespace, shell in one folder.

A block of another language ("text", "json") shows output. A page's blocks must not depend on another page's.
Links, anchors, named files and the site's navigation are checked without the site's tools.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("docs/*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = {"text", "json"}
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:attnfx|benchmarks|docs|examples|kernels|passes|tests)/[\w./-]*)`")


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


@pytest.mark.slow
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


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: its headings, as the site and GitHub name them, and the names of the API page."""
    text = FENCE.sub("", page.read_text())
    titles = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", t) for t in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)]
    slugs = [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", t).strip().lower()) for t in titles]
    assert len(set(slugs)) == len(slugs), f"{page.name}: two headings have one anchor"
    return {*slugs, *re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_the_page_resolve(name):
    page = ROOT / name
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text()))
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), f"{name}: {link}"
        assert not anchor or anchor in anchors(target), f"{name}: {link}"


@pytest.mark.parametrize("name", PAGES)
def test_the_files_that_the_page_names_exist(name):
    missing = [file for file in FILE.findall(FENCE.sub("", (ROOT / name).read_text())) if not (ROOT / file).exists()]
    assert not missing


def test_the_navigation_of_the_site_lists_every_page():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [p for part in (entry.values() if isinstance(entry, dict) else entry) for p in pages(part)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for tool in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(tool, reason="needs pip install -e '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(https?:[^\"]*)", page.read_text())
        assert not loaded, f"{page.name} loads from other hosts: {loaded}"
