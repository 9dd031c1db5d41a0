"""A function of tensors as Inductor compiles it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import compile_fx
from torch.fx.experimental.proxy_tensor import make_fx


def compiled(function: Callable[..., Sequence[Tensor]], operands: Sequence[Tensor], grad: bool) -> Callable[..., Any]:
    """`function` for operands of the sizes, strides and dtypes of `operands`, which are fakes. It is traced once, with
    autograd at work where `grad` says so; what no result needs is not computed. The result is called with no gradient
    of its own, and never makes a CUDA graph."""
    with torch.set_grad_enabled(grad):
        gm = make_fx(function, tracing_mode="fake")(*operands)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    if not gm.graph.output_node().args[0]:
        return lambda *_: ()
    with torch.no_grad():
        return compile_fx.compile_fx(gm, list(operands), config_patches={"triton.cudagraphs": False})  # type: ignore[return-value]


__all__ = ["compiled"]
