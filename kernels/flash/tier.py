"""Provide the flash and decode tiers to the operator. Triton is imported lazily, at the first use of a tier.

If no kernel compiles and fits the device, the call runs in blocks of PyTorch's operators, and reports state this.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from attnfx.kernels.call import Call
from attnfx.kernels.chunked import attention as chunked
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.kernels.gpu import capability, too_old
from attnfx.spec import AttentionSpec

MOST_PROGRAMS = 65535  # limit of a grid's second and third dim, heads and batches (CUDA programming guide)


def missing(device: torch.device, target: int | None = None) -> str | None:
    """Return why the kernels cannot run on this machine, or None; with `target`, on that compute capability."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        from triton import knobs

        return None if knobs.runtime.interpret else "Triton cannot compile for the CPU, which holds the tensors"
    if device.type != "cuda" or (target is None and torch.version.hip is not None):
        return f"the kernels need an NVIDIA GPU, and the tensors are on {device}"
    if target is not None or torch.cuda.is_available():
        return too_old(capability(device) if target is None else target)
    return None


def beyond(batches: int, heads: int) -> str | None:
    """Return why a grid cannot have a program for each batch and head, or None."""
    for name, number in (("batches", batches), ("heads", heads)):
        if number > MOST_PROGRAMS:
            return f"the attention has {number} {name}, and a kernel launch takes at most {MOST_PROGRAMS}"
    return None


def expresses(
    spec: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    value_width: int,
    target: int | None = None,
) -> str | None:
    """Return why the flash and decode tiers cannot run such calls, as one sentence, or None. With `target`, answer for
    a GPU of that compute capability."""
    if (why := missing(device, target)) is not None:
        return why
    from attnfx.kernels.flash.host import forward as launch

    return launch.expresses(spec, dtype, head_dim, value_width)


def source(spec: AttentionSpec) -> str:
    """Return the source of the Triton functions generated for a spec. Raise Unsupported or NotEmitted if impossible."""
    from attnfx.kernels.flash.codegen.emit import emit
    from attnfx.kernels.flash.host import forward as launch

    return emit(spec, launch.program(spec)).text


def summarise(captures: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    """Compute the summary of a mask (see `attnfx.mask.runtime_summary`). `spec` is the spec of the summary."""
    from attnfx.kernels.flash.host import mask_summary as kernels

    return kernels.summarise(captures, sizes, spec)


def supports(call: Call) -> str | None:
    """Return why the flash tier cannot run the call, as one sentence, or None."""
    if (why := missing(call.query.device) or beyond(*call.query.shape[:2])) is not None:
        return why
    from attnfx.kernels.flash.host import forward as launch

    return launch.supports(call)


def forward(call: Call, tile: Tile | None = None, splits: int = 0) -> tuple[Tensor, Tensor]:
    """Compute out (B, H, T, Dv) in the spec's dtype and logsumexp (B, H, T) in float32.

    logsumexp is a natural logarithm, and zero without a softmax. `tile` is tried before the table's tiles.
    """
    from attnfx.kernels.flash.host import forward as launch
    from attnfx.kernels.flash.host.blocks import Run
    from attnfx.kernels.flash.host.fallback import CannotLaunch

    try:
        return launch.forward(call, chosen=tile)
    except CannotLaunch:
        return chunked.forward(call, Run)


def backward(
    call: Call, grad_out: Tensor, out: Tensor, logsumexp: Tensor, grad_logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of query, key, value and the captures with `grad`, each in its tensor's dtype. `out` and
    `logsumexp` may come from either tier's forward pass."""
    from attnfx.kernels.flash.host import backward as gradients
    from attnfx.kernels.flash.host.blocks import Run
    from attnfx.kernels.flash.host.fallback import CannotLaunch

    try:
        return gradients.backward(call, grad_out, out, logsumexp, grad_logsumexp=grad_logsumexp)
    except CannotLaunch:
        return chunked.backward(call, grad_out, out, logsumexp, grad_logsumexp, Run)


def supports_decode(call: Call) -> str | None:
    """Return why the decode tier cannot run the call, as one sentence, or None."""
    if (why := missing(call.query.device) or beyond(*call.query.shape[:2])) is not None:
        return why
    from attnfx.kernels.flash.host import decode as split

    return split.supports(call)


def forward_decode(call: Call, tile: Tile | None = None, splits: int = 0) -> tuple[Tensor, Tensor]:
    """Compute the same as `forward` with the keys split among programs, into `splits` parts unless that is 0."""
    from attnfx.kernels.flash.host import decode as split
    from attnfx.kernels.flash.host.fallback import CannotLaunch

    try:
        return split.forward(call, chosen=tile, wanted=splits)
    except CannotLaunch:
        return forward(call)
