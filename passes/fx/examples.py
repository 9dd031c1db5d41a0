"""Make fresh fakes for tracing, so that tracing does not change the fakes that the compiler reads."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class Untraceable(Exception):
    """The graph cannot be brought to ATen; the message names the obstacle."""


class Transformed(Untraceable):
    """The graph uses functorch transforms that cannot be expanded: it must be compiled exactly as it was made."""


def example(value: Any, mode: FakeTensorMode, learns: bool = True) -> Any:
    """Return a fresh fake of a tensor in `mode`, and any other value as it is. Tracing with it leaves the fakes
    unchanged that the compiler reads afterwards. It requires a gradient if the value does and `learns` is set. Raises
    Untraceable for a tensor that is sparse or not a fake."""
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, FakeTensor):
        raise Untraceable(f"an input is a {type(value).__name__}, not a plain tensor")
    if value.layout != torch.strided:
        raise Untraceable("an input is a sparse tensor")
    with mode, torch.no_grad():
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if not (learns and value.requires_grad):
        return fresh
    if not value.is_leaf:  # autograd allows in-place writes to it, unlike to a leaf
        with mode, torch.enable_grad():
            return fresh.add_(torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True))
    return fresh.requires_grad_()
