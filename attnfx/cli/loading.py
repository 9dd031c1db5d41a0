"""Load the model and inputs of a command from a factory function of the user.

Every failure in the user's code is shown as the user's own traceback, without the frames of this package.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from torch._dynamo.exc import BackendCompilerFailed

from attnfx.errors import BudgetError, OptionError, RefusalError

FAILED, REFUSED, BROKEN = 1, 3, 4  # exit codes besides 0 and click's 2 for wrong usage


def exit_codes(third: str = "") -> str:
    """Return the help text on exit codes; `third` is the meaning of REFUSED for the command, if it has one."""
    third = third and f"{REFUSED} {third}; "
    return f"Exit codes: 0 done; 1 your own code failed; 2 wrong use of the command; {third}4 attnfx itself failed."


EXIT_CODES = exit_codes()
ARGUMENT_HELP = "FILE.py:FACTORY or module:factory, a function without arguments that returns (model, inputs)"
_OURS = Path(__file__).resolve().parent.parent


class UsersError(click.ClickException):
    """A failure of the user's own code; the message is its traceback."""

    exit_code = FAILED

    def show(self, file: Any = None) -> None:
        click.echo(self.format_message(), file=file, err=file is None)


class Refused(click.ClickException):
    """A refused site under --strict, or a budget that no plan fits."""

    exit_code = REFUSED


class Broken(click.ClickException):
    """A failure of attnfx itself; the message is its traceback."""

    exit_code = BROKEN


def load(text: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Load a model, and the positional and keyword arguments to call it with.

    `text` is "FILE.py:FACTORY" or "module:factory". The factory takes no arguments and returns (model, inputs). Inputs
    are a tensor (the only argument), a tuple or list of arguments, or a dict of keyword arguments.

    Raises:
        click.UsageError: The file, module or function that `text` names does not exist.
        UsersError: The file does not import, the factory raises, or it returns something else.
    """
    place, _, name = text.rpartition(":")
    relative = place.startswith(".") and not place.endswith(".py")
    if not place or not name or relative:
        raise click.UsageError(f"{text!r} is not of the form FILE.py:FACTORY or module:factory")
    module = _file(place) if place.endswith(".py") else _module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        there = ", ".join(n for n, x in vars(module).items() if _is_function_of(x, module)) or "none"
        raise click.UsageError(f"{place} has no function {name!r}; its functions: {there}")
    with users_code(f"{name}() of {place} failed"):
        made = factory()
    return taken_apart(made, f"{name}() of {place}")


def taken_apart(made: Any, source: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Split a factory's result into model, args and kwargs. Raises UsersError if it has another form."""
    if not isinstance(made, tuple | list) or len(made) != 2 or not callable(made[0]):
        raise UsersError(f"{source} returned {_kind(made)}, expected a tuple (model, inputs)")
    model, inputs = made
    if isinstance(inputs, torch.Tensor):
        return model, (inputs,), {}
    if isinstance(inputs, tuple | list):
        return model, tuple(inputs), {}
    if isinstance(inputs, Mapping) and all(isinstance(k, str) for k in inputs):
        return model, (), dict(inputs)
    raise UsersError(f"{source} returned {_kind(inputs)} as inputs, expected a tensor, a tuple or a dict")


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Run the user's code; its exceptions become a UsersError that begins with `what`."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except (Exception, SystemExit) as problem:
        raise UsersError(f"{what}:\n\n{users_traceback(problem)}") from problem


@contextmanager
def tracing() -> Iterator[None]:
    """Run `explain` or `plan` on the user's model, and sort its errors by their origin.

    An error of the model is shown as the user's own (exit code 1), a bad option as wrong use (exit code 2), a refusal
    under `strict` or a budget that no plan fits as a refusal (exit code 3), and an error of attnfx as its own (exit
    code 4).
    """
    # PyTorch also logs the traceback of an operator that fails during tracing; show the error only once
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except BackendCompilerFailed as problem:
        cause = problem.__cause__ or problem
        if isinstance(cause, RefusalError) or "RefusalError" in str(problem):
            raise Refused(str(cause)) from problem
        told = "".join(traceback.format_exception(cause)).rstrip()
        raise Broken(f"attnfx itself failed; please report this to its issue tracker:\n\n{told}") from problem
    except OptionError as problem:
        raise click.UsageError(str(problem)) from None
    except (RefusalError, BudgetError) as problem:
        raise Refused(str(problem)) from problem
    except Exception as problem:
        raise UsersError(f"the model failed while it was traced:\n\n{users_traceback(problem)}") from problem
    finally:
        log.disabled = before


def users_traceback(problem: BaseException) -> str:
    """Format a traceback without this package's frames, and without importlib and torch frames above the user's.

    Dynamo's error about a failed operator is shown as the operator's own error at the user's line.
    """
    stack = getattr(problem, "real_stack", None)
    if stack and type(problem).__module__.startswith("torch._dynamo"):
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(list(stack))]
        return "".join(lines) + _operators_own(str(problem))
    shown = traceback.TracebackException.from_exception(problem)
    at: traceback.TracebackException | None = shown
    while at is not None:
        at.stack = traceback.StackSummary.from_list(_users(list(at.stack)))
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return "".join(shown.format()).rstrip()


def _operators_own(message: str) -> str:
    found = re.search(r"got (\w+)\((['\"])(.*)\2\)", message, re.DOTALL)
    return f"{found[1]}: {found[3]}" if found else message.split("\n\nfrom user code")[0]


def _users(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    ours = [n for n, f in enumerate(frames) if Path(f.filename).is_relative_to(_OURS)]
    kept = frames[ours[-1] + 1 :] if ours else frames
    first = next((n for n, f in enumerate(kept) if not _is_plumbing(f.filename)), len(kept))
    return kept[first:]


def _is_plumbing(file: str) -> bool:
    return file.startswith("<frozen importlib") or "/importlib/" in file or "/torch/" in file


def _file(place: str) -> ModuleType:
    path = Path(place).expanduser()
    if not path.is_file():
        raise click.UsageError(f"the file {place!r} does not exist")
    name = path.stem if path.stem not in sys.modules else f"{path.stem} (a file of the user)"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look up a class's module there
    _make_importable(path.resolve().parent)
    with users_code(f"{place} could not be imported"):
        spec.loader.exec_module(module)
    return module


def _module(place: str) -> ModuleType:
    _make_importable(Path.cwd())
    with users_code(f"{place} could not be imported"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as problem:
            if not f"{place}.".startswith(f"{problem.name}."):  # a module that the user's module imports
                raise
            raise click.UsageError(f"the module {place!r} does not exist; to name a file, include its .py") from None


def _make_importable(folder: Path) -> None:
    """Add a folder to sys.path, so that the user's file can import its neighbors. It goes to the end, so that the
    folder's files cannot hide installed packages."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _is_function_of(x: Any, module: ModuleType) -> bool:
    return callable(x) and not isinstance(x, type) and getattr(x, "__module__", "") == module.__name__


def _kind(x: Any) -> str:
    inside, name = f" of {len(x)}" if isinstance(x, tuple | list) else "", type(x).__name__
    return "None" if x is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}{inside}"
