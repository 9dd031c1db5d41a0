"""Trace a model through a code object of its own, and leave no trace of it in Dynamo or in the model.

Dynamo counts compilations per code object and gives up at `torch._dynamo.config.recompile_limit`; it also remembers the
sizes that a code object has seen. `explain` and `plan` trace a model often and run none of the results, so that their
traces must not count for the user's own compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

OWN = ("_parameters", "_buffers", "_modules")  # dictionaries of a module besides its attributes


@contextmanager
def private_code(model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield the model, or a function that calls it, such that Dynamo compiles a copy of its code.

    Attributes and buffers that a module's forward assigns are put back at the end of the block. Frames that Dynamo
    compiles on their own, after a graph break, keep their code; the limit is lifted for them while the block runs.
    """
    # otherwise two traces of different sizes would make the next trace symbolic
    settings = torch._dynamo.config.patch(
        recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16, automatic_dynamic_shapes=False
    )
    if not isinstance(model, nn.Module):
        with settings:
            yield _copied(model if _plain(model) else _calling(model))
        return
    before = [(m, dict(m.__dict__), {name: dict(m.__dict__[name]) for name in OWN}) for m in model.modules()]
    own = _plain(model.forward) and type(model).__call__ is nn.Module.__call__
    model.__dict__["forward"] = _copied(model.forward)
    try:
        with settings:
            yield model if own and not type(model).__module__.startswith("torch.") else _copied(_calling(model))
    finally:
        for module, held, owned in before:
            module.__dict__.clear()
            module.__dict__.update(held)
            for name, entries in owned.items():
                held[name].clear()
                held[name].update(entries)


def _plain(fn: Any) -> bool:
    """Return whether a callable is a function or a method whose own code Dynamo compiles, and not a decorator's."""
    return isinstance(fn, FunctionType | MethodType) and not hasattr(fn, "__wrapped__")


def _calling(model: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a callable, whose own frame may be code that others share: a decorator's, or PyTorch's for nn.Sequential."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return call


def _copied(fn: Any) -> Any:
    """Return a function or method with a new code object; anything else as it is."""
    if isinstance(fn, MethodType):
        return MethodType(_copied(fn.__func__), fn.__self__)
    if not isinstance(fn, FunctionType):
        return fn
    # Dynamo remembers sizes by file, line and name: with another name, traces leave the user's entries alone
    code = fn.__code__.replace(co_name=f"{fn.__code__.co_name}_traced")
    made = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    made.__kwdefaults__, made.__qualname__, made.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    made.__dict__.update(fn.__dict__)
    return made
