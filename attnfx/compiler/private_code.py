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
    # the sizes of one trace must not make those of the next symbolic
    settings = torch._dynamo.config.patch(
        recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16, automatic_dynamic_shapes=False
    )
    if not isinstance(model, nn.Module) or type(model).__module__.startswith("torch."):
        with settings:
            yield _copied(_calling(model) if isinstance(model, nn.Module) else model)
        return
    held = model.__dict__
    before = {"forward": held["forward"]} if "forward" in held else {}
    held["forward"] = _copied(model.forward)
    try:
        with settings:
            yield model
    finally:
        del held["forward"]
        held.update(before)


def _calling(model: nn.Module) -> Callable[..., Any]:
    """Wrap a module of PyTorch, such as nn.Sequential: Dynamo runs it through a function that all of them share."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return call


def _copied(fn: Any) -> Any:
    """Return a function or method with a new code object; anything else as it is."""
    if isinstance(fn, MethodType):
        return MethodType(_copied(fn.__func__), fn.__self__)
    if not isinstance(fn, FunctionType):
        return fn
    # Dynamo keeps the sizes that it has seen by file, line and name: those of the traces get a name of their own
    code = fn.__code__.replace(co_name=f"{fn.__code__.co_name}_traced")
    made = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    made.__kwdefaults__, made.__qualname__, made.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    made.__dict__.update(fn.__dict__)
    return made
