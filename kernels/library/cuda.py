"""Express specs as calls of PyTorch's fused GPU attention, `aten.scaled_dot_product_attention`.

The graph calls the operator directly, not through one of `torch.ops.attnfx`. PyTorch then chooses the kernel, saves
tensors for the backward pass and differentiates as for any such call. A mask tensor is never passed: for a fully masked
row the kernels return zeros, but eager returns NaN or an average. Dropout is not passed either: FlashAttention-2 rounds
the keep probability to a multiple of 1/256.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from attnfx.ir import algebra as A
from attnfx.kernels.gpu import capability
from attnfx.kernels.library.cpu import form_of
from attnfx.spec import AttentionSpec, I, J
from attnfx.targets import sdpa_dispatch as fused


class Fused(NamedTuple):
    """The call softmax(scale * query @ key.mT) @ value; with `causal`, query i sees the keys up to i."""

    scale: float
    causal: bool


@lru_cache(maxsize=1024)
def call_of(spec: AttentionSpec) -> Fused | str:
    """Return the operator's arguments for a spec, or why no device can compute the spec with it."""
    form = form_of(spec)
    if isinstance(form, str):
        return form
    if spec.extra:
        return "the softmax has columns beside the keys"
    if not isinstance(form.scale, float):
        return "the scale is not a constant"
    if not form.scale > 0:
        return f"the scale is {form.scale:g}, and PyTorch's kernels need a positive one"
    if form.bias is not A.const(0.0):
        return "the attention adds a bias to the scores"
    if form.keep not in ((), (A.ge(I, J),)):
        return "the mask is not plain causality"
    return Fused(form.scale, bool(form.keep))


def expresses(
    spec: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    value_width: int,
    target: int | None = None,
    *,
    grouped: bool = False,
    square: bool = True,
) -> str | None:
    """Return why a spec cannot be such a call, as one sentence, or None. With `target`, answer for a GPU of that
    compute capability. `grouped`: heads share keys. `square`: there are as many queries as keys."""
    call, name = call_of(spec), str(dtype).removeprefix("torch.")
    if isinstance(call, str):
        return call
    if spec.compute != "float32" or spec.out_dtype != name:
        needs = f"the attention needs {spec.compute} and {spec.out_dtype}"
        return f"PyTorch's operator computes in float32 and returns {name}, and {needs}"
    if device.type != "cuda" or (target is None and (torch.version.hip is not None or not torch.cuda.is_available())):
        return "PyTorch's kernels need an NVIDIA GPU"
    capable = capability(device) if target is None else target
    cudnn = target is not None or prefers_cudnn()
    plain = square or not call.causal
    chosen = fused.kernel(name, capable, head_dim, value_width, cudnn, grouped, plain)
    if chosen is None:
        widths = f"{head_dim}" if head_dim == value_width else f"{head_dim} and {value_width}"
        shared = " with heads that share keys" if grouped else ""
        here = f"compute capability {capable // 10}.{capable % 10}"
        return f"PyTorch lacks a kernel for {name} of width {widths}{shared} on {here}"
    if chosen == fused.CUDNN and not plain:
        return "cuDNN's causal kernel needs as many queries as keys"
    cuda = torch.backends.cuda
    if target is None and chosen == fused.FLASH and not cuda.flash_sdp_enabled():
        return "FlashAttention is turned off in torch.backends.cuda"
    if target is None and chosen == fused.EFFICIENT and not cuda.mem_efficient_sdp_enabled():
        return "memory-efficient attention is turned off in torch.backends.cuda"
    return None


def prefers_cudnn() -> bool:
    """Return whether PyTorch prefers cuDNN's kernel in this process, on the devices that allow it."""
    version = torch.backends.cudnn.version() or 0
    return (
        version > fused.PREFERRED
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
    )
