"""Express specs as calls of PyTorch's fused GPU attention, `aten.scaled_dot_product_attention`.

The graph calls the operator directly, not through one of `torch.ops.attnfx`. PyTorch then chooses the kernel, saves
tensors for the backward pass and differentiates as for any such call. FlashAttention is called by its own operator,
because PyTorch may prefer cuDNN's kernel. A mask tensor is never passed: for a fully masked row the kernels return
zeros, but eager returns NaN or an average. Dropout is not passed either: FlashAttention-2 rounds the keep probability
to a multiple of 1/256.
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
    """The call softmax(scale * query @ key.mT) @ value; with `causal`, query i sees the keys up to i. With `flash`,
    FlashAttention computes it, else the kernel that PyTorch selects."""

    scale: float
    causal: bool
    flash: bool = False


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


def kernels(
    spec: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    value_width: int,
    target: int | None = None,
    backends: fused.Backends = fused.USUAL,
    *,
    grouped: bool = False,
    square: bool = True,
    training: bool = False,
) -> tuple[str, ...] | str:
    """Return the names of the kernels that can compute a spec, PyTorch's own selection first, or the reason against
    all, as one sentence. With `target`, answer for a GPU of that compute capability, which need not be present.
    `grouped`: heads share keys. `square`: there are as many queries as keys. `training`: a backward pass follows."""
    call, name = call_of(spec), str(dtype).removeprefix("torch.")
    if isinstance(call, str):
        return call
    if spec.compute != "float32" or spec.out_dtype != name:
        needs = f"the attention needs {spec.compute} and {spec.out_dtype}"
        return f"PyTorch's operator computes in float32 and returns {name}, and {needs}"
    if device.type != "cuda" or (target is None and (torch.version.hip is not None or not torch.cuda.is_available())):
        return "PyTorch's kernels need an NVIDIA GPU"
    capable = capability(device) if target is None else target
    shape = fused.Shape(name, capable, head_dim, value_width, grouped, square or not call.causal)
    return fused.offered(shape, backends, training)


def expresses(*of: object, **shape: object) -> str | None:
    """Return why a spec cannot be such a call, as one sentence, or None. It takes the arguments of `kernels`."""
    found = kernels(*of, **shape)  # type: ignore[arg-type]
    return found if isinstance(found, str) else None
