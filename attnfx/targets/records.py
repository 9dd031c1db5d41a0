"""Records of devices: those that come with attnfx and those that users write, JSON with a source for each number."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from attnfx.errors import OptionError
from attnfx.targets.target import Target

FOLDER = Path(__file__).with_name("records")
_VENDORS = re.compile(r"\b(nvidia|amd|tesla|geforce|instinct|radeon)\b")


def key(name: str) -> str:
    """A device's name without what people write differently: case, spaces, dashes, the vendor."""
    return re.sub(r"[^a-z0-9]", "", _VENDORS.sub("", re.sub(r"[-_\s]+", " ", name.lower())))


@lru_cache
def records() -> Mapping[str, Target]:
    """Name -> record."""
    return {made.name: made for made, _ in _read()}


@lru_cache
def aliases() -> Mapping[str, Target]:
    """What `key` makes of each name that a record goes by -> the record."""
    return {key(name): made for made, others in _read() for name in (made.name, *others)}


@lru_cache
def _read() -> tuple[tuple[Target, tuple[str, ...]], ...]:
    found = []
    for file in sorted(FOLDER.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        found.append((_target(data, str(file)), tuple(data.get("aliases", ()))))
    return tuple(found)


def by_name(name: str) -> Target:
    """As `Target.by_name`."""
    found = aliases().get(key(name))
    if found is None:
        raise OptionError(
            f"unknown target {name!r}; the nearest is {nearest(name)!r} (of {', '.join(Target.names())}; a path to a "
            "JSON file is taken too)"
        )
    return found


def nearest(name: str) -> str:
    """The name of the record whose name or alias is most like this one."""

    def alike(entry: tuple[str, Target]) -> float:
        return difflib.SequenceMatcher(None, key(name), entry[0]).ratio()

    return max(aliases().items(), key=alike)[1].name


def from_json(source: str | PathLike[str]) -> Target:
    """As `Target.from_json`."""
    text = fspath(source)
    where = "the target's JSON text"
    if not text.lstrip().startswith("{"):
        where = repr(text)
        try:
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise OptionError(f"the target's file {where} cannot be read: {problem}") from problem
    try:
        data = json.loads(text)
    except ValueError as problem:
        raise OptionError(f"{where} is not valid JSON: {problem}") from problem
    if not isinstance(data, dict):
        raise OptionError(f"{where} holds no JSON object of a target's fields")
    return _target(data, where)


def _target(data: Mapping[str, Any], where: str) -> Target:
    given = {name: value for name, value in data.items() if name != "aliases"}
    known = [f.name for f in fields(Target)]
    for name in given:
        if name not in known:
            close = max(known, key=lambda k: difflib.SequenceMatcher(None, name, k).ratio())
            raise OptionError(f"{where}: a target has no field {name!r}, the nearest is {close!r}")
    for f in fields(Target):
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise OptionError(f"{where}: the field {f.name!r} of the target is missing")
    return Target(**given)
