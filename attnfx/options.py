"""Define the options of `torch.compile(model, backend="attnfx", options={...})`.

One frozen dataclass holds them. The environment variable `ATTNFX_<OPTION>` sets an option's default.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, get_args

from attnfx.errors import OptionError
from attnfx.memory.byte_size import check as check_budget
from attnfx.targets import Target
from attnfx.targets.target import key

Rewrite: TypeAlias = Literal["cost", "always", "never"]
Tier: TypeAlias = Literal["flash", "decode", "library", "flex", "chunked", "kept"]
Verify: TypeAlias = Literal["off", "first"]
Inner: TypeAlias = Literal["inductor", "aot_eager", "eager"]
Tune: TypeAlias = Literal[False, True, "known", "again"]

TIERS: tuple[Tier, ...] = get_args(Tier)

T = TypeVar("T")
SIMILAR = 0.6  # smallest difflib ratio of an unknown name and an option that is suggested for it
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Options:
    """The backend's options, checked and normalized.

    Attributes:
        rewrite: Rewrite a site if it is predicted to help ("cost"), whenever it is sound ("always"), or
            never ("never").
        target: The device to decide for; "auto" is the device of the graph's tensors. A record's name or the path of
            a JSON file becomes its `Target`.
        tiers: The tiers that may be chosen, as names or as text such as "flash,library": "flash", "decode", "library",
            "flex", "chunked", "kept". They are stored in this order; "kept" is always among them.
        memory_budget: The largest allowed peak of the compiled step: bytes, "16GiB", a fraction of the device's
            memory, or "auto" for its free memory; None sets no limit.
        verify: "first" compares each rewritten site with the original subgraph when a graph is compiled, on the
            inputs of its first call; on a mismatch the original stays.
        strict: Raise RefusalError if a site is refused, or the error if attnfx itself fails, instead of compiling the
            original.
        dump_dir: The path of a folder, stored as an absolute path; every graph's stages are written under it.
        inner: The compiler of the rewritten graph: "inductor", "aot_eager" or "eager".
        tune: Time the likeliest candidates of each site once, and keep the times in the user's cache; "known" uses
            cached times and measures nothing, "again" measures anew and replaces them.

    Raises:
        OptionError: A value is not valid, or not available in this version.
    """

    rewrite: Rewrite = "cost"
    target: str | Target = "auto"
    tiers: tuple[Tier, ...] = TIERS
    memory_budget: int | float | str | None = None
    verify: Verify = "off"
    strict: bool = False
    dump_dir: Path | None = None
    inner: Inner = "inductor"
    tune: Tune = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(f"option {name!r}", getattr(self, name)))

    @classmethod
    def make(cls, given: Mapping[str, object] | None = None) -> Options:
        """Build options from names and values; the rest come from the environment, else the defaults.

        Raises:
            OptionError: A name is unknown, or a value is not valid or not available in this version. The message
                names the nearest valid one, and the environment variable if the value came from one.
        """
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise OptionError(
                f"options must be a mapping of names to values, such as {{'strict': True}}, not {given!r}"
            )
        check_names(given)
        return cls(**{**_from_environment(skip=given.keys()), **given})  # pyright: ignore[reportArgumentType]

    def without_timing(self) -> Options:
        """Return the options for a report or a plan, which use cached measurements and time nothing."""
        return replace(self, tune="known") if self.tune else self


def _from_environment(skip: Iterable[str]) -> dict[str, object]:
    """Read options from `ATTNFX_<OPTION>` variables; an empty variable counts as unset."""
    found = {}
    for name in _CHECKS.keys() - skip:
        variable = f"ATTNFX_{name.upper()}"
        text = os.environ.get(variable, "").strip()
        if text:
            found[name] = _CHECKS[name](f"environment variable {variable}", _parse(name, text))
    return found


def _parse(name: str, text: str) -> object:
    """Parse an environment variable's text; unparsable text is returned for the check to reject."""
    if name in ("strict", "tune"):
        return _SWITCH.get(text.lower(), text)
    if name in ("memory_budget", "dump_dir") and text.lower() == "none":
        return None
    if name == "memory_budget":
        return number(text)
    return text


def number(text: str) -> int | float | str:
    """Convert text to an int or float if possible; else return it unchanged."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_names(given: Iterable[object], others: Iterable[str] = ()) -> None:
    """Raise OptionError for a name that is neither an option nor one of `others`, a caller's own keyword arguments."""
    valid = [*_CHECKS, *others]
    for name in given:
        if name not in valid:
            raise OptionError(_unknown(name, valid))


def _unknown(name: object, valid: Sequence[str]) -> str:
    """Describe an unknown option and name a similar one; say so if it belongs to torch.compile or Inductor."""
    import torch._inductor  # only for an error message: this module otherwise avoids importing torch

    if name == "mode":
        whose = " (mode is an argument of torch.compile itself)"
    elif name in torch._inductor.list_options():
        whose = " (Inductor's settings belong in torch._inductor.config)"
    else:
        whose = ""
    similar = difflib.get_close_matches(str(name).lower(), valid, 1, SIMILAR)
    meant = f"; did you mean {similar[0]!r}? Valid" if similar else "; valid"
    return f"unknown option {name!r}{whose}{meant} options: {', '.join(valid)}"


def _choice(*valid: T) -> Callable[[str, object], T]:
    """Make a check for one of several strings or truth values."""

    def check(source: str, value: object) -> T:
        if isinstance(value, str | bool) and value in valid:
            return value  # pyright: ignore[reportReturnType]
        text = str(bool(value) if isinstance(value, int) and value in (0, 1) else value).lower()
        nearest = max(valid, key=lambda x: difflib.SequenceMatcher(None, text, str(x).lower()).ratio())
        raise OptionError(f"{source}: {value!r} is not valid; did you mean {nearest!r}? Valid values: {_listed(valid)}")

    return check


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(repr, values))


def _target(source: str, value: object) -> str | Target:
    if value == "auto" or isinstance(value, Target):
        return value  # pyright: ignore[reportReturnType]
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OptionError(
            f"{source}: {value!r} is not a target; give 'auto', a name such as 'h100-sxm', or a JSON file"
        )
    text = os.fsdecode(value)
    if difflib.SequenceMatcher(None, key(text), "auto").ratio() > 0.7:
        raise OptionError(f"{source}: {value!r} is not a target; did you mean 'auto'?")
    if key(text) == "cpu":
        raise OptionError(f"{source}: {value!r} is not a target; for this CPU omit `target` and use CPU tensors")
    try:
        is_file = text.endswith(".json") or os.path.dirname(text) or not isinstance(value, str)
        return Target.from_json(text) if is_file else Target.by_name(text)
    except OptionError as problem:
        raise OptionError(f"{source}: {problem}") from problem


def _tiers(source: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise OptionError(
            f"{source}: {value!r} is not a list of tiers, such as 'flash,library'; valid tiers: {_listed(TIERS)}"
        )
    one = _choice(*TIERS)
    names = {one(source, name) for name in value}
    if not names:
        raise OptionError(
            f"{source}: the list of tiers is empty; for no rewrite, give 'kept'. Valid tiers: {_listed(TIERS)}"
        )
    return tuple(tier for tier in TIERS if tier in names or tier == "kept")


def _dump_dir(source: str, value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OptionError(f"{source}: {value!r} is not a path; give the path of a folder, or None")
    path = Path(os.fsdecode(value)).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise OptionError(
            f"{source}: {str(path)!r} is a file, not a folder; give a folder, such as {str(path.parent)!r}"
        )
    return path


# Each takes the value's source, for the message, and the value; returns the normalized value or raises OptionError.
_CHECKS: dict[str, Callable[[str, object], object]] = {
    "rewrite": _choice(*get_args(Rewrite)),
    "target": _target,
    "tiers": _tiers,
    "memory_budget": check_budget,
    "verify": _choice(*get_args(Verify)),
    "strict": _choice(False, True),
    "dump_dir": _dump_dir,
    "inner": _choice(*get_args(Inner)),
    "tune": _choice(*get_args(Tune)),
}
assert [field.name for field in fields(Options)] == list(_CHECKS)
