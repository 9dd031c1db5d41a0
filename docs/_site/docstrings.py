"""Turn the aligned name lists of the project's docstrings into sections that mkdocstrings renders as tables.

A docstring lists attributes or parameters as `name    meaning` lines with aligned meanings. Markdown would join these
lines into one paragraph. The source files are parsed, never imported.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^(\w+)( {2,}| (?=\S))(\S.*)$")


class AlignedLists(griffe.Extension):
    """Rewrite docstrings when griffe has loaded the package."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        rewrite(cls, "Attributes")

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        rewrite(func, "Args")


def rewrite(owner: griffe.Class | griffe.Function, section: str) -> None:
    if owner.docstring is None:
        return
    names = set(owner.members) if isinstance(owner, griffe.Class) else {p.name for p in owner.parameters}
    owner.docstring.value = sections(owner.docstring.value, section, names)


def sections(text: str, section: str, names: set[str]) -> str:
    """Replace each paragraph that is an aligned list by a Google-style section; other paragraphs stay."""
    out = []
    for paragraph in text.split("\n\n"):
        items = aligned(paragraph.split("\n"))
        if items is None or not any(name in names for name, _ in items):
            out.append(paragraph)
        else:
            out.append("\n".join([f"{section}:", *(f"    {name}: {meaning}" for name, meaning in items)]))
    return "\n\n".join(out)


def aligned(lines: list[str]) -> list[tuple[str, str]] | None:
    """Return the (name, meaning) pairs of an aligned list, or None if the lines are not one."""
    first = re.match(r"^\w+ {2,}(?=\S)", lines[0])
    if first is None and not any(re.match(r"^\w+ {2,}\S", line) for line in lines):
        return None
    items: list[tuple[str, str]] = []
    for line in lines:
        found = ITEM.match(line)
        if found:
            items.append((found[1], found[3]))
        elif line.startswith("  ") and items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
        else:
            return None
    return items
