"""Trace a model through a code object of its own, so that the traces do not use up Dynamo's recompile limit.

Dynamo counts compilations per code object and gives up at `torch._dynamo.config.recompile_limit`. `explain` and `plan`
trace a model often and run none of the results: their traces must not count against the user's own compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn


@contextmanager
def private_code(model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield the model with a copy of the code of its forward; a module is changed until the end of the block.

    Callables other than functions, methods and modules are yielded as they are. Frames that Dynamo compiles on their
    own, after a graph break, keep their code; the limit is lifted for them while the block runs.
    """
    limits = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
    if not isinstance(model, nn.Module):
        with limits:
            yield _copied(model)
        return
    held = model.__dict__
    before = {"forward": held["forward"]} if "forward" in held else {}
    held["forward"] = _copied(model.forward)
    try:
        with limits:
            yield model
    finally:
        del held["forward"]
        held.update(before)


def _copied(fn: Any) -> Any:
    """Return a function or method with a new code object; anything else as it is."""
    if isinstance(fn, MethodType):
        return MethodType(_copied(fn.__func__), fn.__self__)
    if not isinstance(fn, FunctionType):
        return fn
    made = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    made.__kwdefaults__, made.__qualname__, made.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    made.__dict__.update(fn.__dict__)
    return made
