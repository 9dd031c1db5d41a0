"""Predict the kernel that PyTorch's fused operator runs on an NVIDIA GPU without dropout.

From aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: cuDNN's comes first on compute capability 9.0 and 10.x with a
cuDNN above 9.15 (`check_prefer_cudnn_attention`; the wheels of PyTorch 2.11 and later for CUDA 13 include one), then
FlashAttention-2 (`can_use_flash_attention`), then the memory-efficient kernel of xFormers, built with CUTLASS
(`can_use_mem_efficient_attention`). For inputs that none of them accepts, PyTorch materializes all scores.

`torch.nn.attention.activate_flash_attention_impl` puts FlashAttention-3 or 4 in FlashAttention-2's place. The order and
the conditions stay the same, so that a call which the new kernels do not take raises an error.

From 8.0 on, the memory-efficient kernel computes a float32 product as three TF32 products (`OpMultiplyAddFastF32` in
mem_eff_attention/gemm_kernel_utils.h), which keeps float32's accuracy. On older GPUs it uses plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

CUDNN, FLASH, EFFICIENT = "cudnn", "flash-attention-2", "memory-efficient"
FLASH3, FLASH4 = "flash-attention-3", "flash-attention-4"
IMPLEMENTATIONS = {"FA2": FLASH, "FA3": FLASH3, "FA4": FLASH4}  # by their names in torch.nn.attention
PREFERRED = 91500  # cuDNN's kernel is preferred above this version of cuDNN
ASSUMED = 92000  # the version in PyTorch 2.13's wheel for CUDA 13: pytorch/pytorch issue 196678
# Versions of cuDNN, as torch.backends.cudnn.version() states them, to whose backward pass attnfx moves training, each
# with the source that it is right. None yet, as each preferred version has an open report of NaN in its gradients:
# NVIDIA/cudnn-frontend issues 160 (9.12) and 1072 (9.25.1 and 9.26), pytorch/pytorch issue 196678 (9.20).
CUDNN_BACKWARD: Mapping[int, str] = {}
DTYPES = ("float16", "bfloat16")
LEAST_CAPABILITY, MOST_CAPABILITY = 80, 121  # of FlashAttention-2's kernels
# Compute capabilities over ten of the other implementations: torch/nn/attention/_fa3.py and _fa4.py
GENERATIONS = {FLASH3: (9,), FLASH4: (9, 10)}
FLASH4_WIDTHS = (64, 96, 128)  # Dao-AILab/flash-attention, flash_attn/cute/interface.py: "hdim 64, 96, 128"
MULTIPLE = 8  # head widths are multiples of it; others are copied to the next one
CUDNN_WIDTH, FLASH_WIDTH = 128, 256
# On GPUs with less shared memory (SMALL), FlashAttention-2's backward pass does not run these widths.
SMALL, BETWEEN = (86, 89, 120, 121), range(193, 225)
# The memory-efficient kernel: the oldest GPU with matrix instructions that it uses (older ones are not targets here),
# and the multiple to which it pads the rows of a logsumexp.
LEAST_EFFICIENT, LOGSUMEXP_ROWS = 70, 32


@dataclass(frozen=True)
class Backends:
    """The kernels of PyTorch's fused operator in a process.

    cudnn      version of cuDNN if PyTorch prefers its kernel on the GPUs that allow it, else 0
    flash      the active implementation of FlashAttention, a key of IMPLEMENTATIONS; "" if it is turned off
    efficient  whether the memory-efficient kernel is on
    """

    cudnn: int = ASSUMED
    flash: str = "FA2"
    efficient: bool = True


USUAL = Backends()


@dataclass(frozen=True)
class Shape:
    """The properties of a call that select its kernel.

    grouped  whether heads share keys
    plain    whether the call lacks a mask tensor and, if causal, has as many queries as keys
    """

    dtype: str
    capability: int
    head_dim: int
    value_width: int
    grouped: bool = False
    plain: bool = True

    def __str__(self) -> str:
        same = self.head_dim == self.value_width
        widths = f"{self.head_dim}" if same else f"{self.head_dim} and {self.value_width}"
        shared = " with heads that share keys" if self.grouped else ""
        here = f"compute capability {self.capability // 10}.{self.capability % 10}"
        return f"{self.dtype} of width {widths}{shared} on {here}"


def kernel(of: Shape, backends: Backends = USUAL) -> str | None:
    """Return the kernel that PyTorch selects: CUDNN, FLASH, FLASH3, FLASH4, EFFICIENT or None."""
    if not of.capability <= MOST_CAPABILITY:
        return None
    widths = of.head_dim, of.value_width
    half = of.dtype in DTYPES and of.capability >= LEAST_CAPABILITY and not any(n % MULTIPLE for n in widths)
    if half and backends.cudnn and of.capability // 10 in (9, 10) and max(widths) <= CUDNN_WIDTH:
        return CUDNN
    small = of.capability in SMALL and of.head_dim in BETWEEN
    if half and backends.flash and of.plain and widths[0] == widths[1] <= FLASH_WIDTH and not small:
        return IMPLEMENTATIONS[backends.flash]
    return EFFICIENT if backends.efficient and not of.grouped and _efficient(of) else None


def offered(of: Shape, backends: Backends = USUAL, training: bool = False) -> tuple[str, ...] | str:
    """Return the kernels that a rewrite may call, PyTorch's own selection first if it is one of them, or the reason
    against all. Behind cuDNN's kernel comes FlashAttention-3 or 4 if it is active, and in training FlashAttention of
    any version if cuDNN's backward pass is not to be trusted."""
    first = kernel(of, backends)
    if first is None:
        return f"PyTorch lacks a kernel for {of}"
    if first != CUDNN:
        return beyond(first, of) or (first,)
    if not of.plain:
        return "cuDNN's causal kernel needs as many queries as keys"
    trusted = not training or backends.cudnn in CUDNN_BACKWARD
    behind = kernel(of, replace(backends, cudnn=0))
    why = None if behind is None else beyond(behind, of)
    names = [CUDNN] * trusted
    if why is None and (behind in (FLASH3, FLASH4) or (behind == FLASH and not trusted)):
        names.append(behind)
    suspect = f"gradients of cuDNN {version(backends.cudnn)} may be NaN: its version is not on the list of right ones"
    return tuple(names) or (f"{suspect}, and {why}" if why else suspect)


def version(cudnn: int) -> str:
    """Return a version of cuDNN as text: 9.20.0 for 92000."""
    return f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"


def beyond(name: str, of: Shape) -> str | None:
    """Return why an implementation of FlashAttention does not take a call for which PyTorch selects it, or None."""
    generations = GENERATIONS.get(name)
    if generations is not None and of.capability // 10 not in generations:
        least = " or ".join(f"{n}.x" for n in generations)
        return f"{name} is active, and needs compute capability {least}"
    if name == FLASH4 and of.head_dim not in FLASH4_WIDTHS:
        return f"{name} is active, and takes heads of width 64, 96 and 128"
    return None


def _efficient(of: Shape) -> bool:
    """Return whether the memory-efficient kernel supports such operands. It is not used if heads share keys: some
    versions of PyTorch then copy the keys, others materialize all scores."""
    least = {"float32": LEAST_EFFICIENT, "float16": LEAST_EFFICIENT, "bfloat16": LEAST_CAPABILITY}.get(of.dtype)
    if least is None or of.capability < least:
        return False
    # `minimum_gemm_alignment`: 16 bytes for matrix instructions
    step = MULTIPLE if of.dtype in DTYPES else 4 if of.capability >= LEAST_CAPABILITY else 1
    return not (of.head_dim % step or of.value_width % step)


def rounded(width: int) -> int:
    """Round a head width up to the width of the kernels: FlashAttention-2 has one for each multiple of 32."""
    return -(-width // 32) * 32


def logsumexp(name: str, rows: int) -> int:
    """Return the rows of the logsumexp that a kernel saves for the backward pass, with `rows` queries."""
    return -(-rows // LOGSUMEXP_ROWS) * LOGSUMEXP_ROWS if name == EFFICIENT else rows


def workspace(query: Sequence[int], key: Sequence[int], value_width: int, element: int) -> int:
    """Return the bytes of the backward pass beyond operands, logsumexp and gradients.

    `query` is the shape (B, H, T, ...) and `key` the shape (B, G, S, D). FlashAttention-2 (mha_bwd in flash_api.cpp)
    allocates the query's gradient in float32 and a sum per row, with rows padded to a multiple of 128. If heads share
    keys, it also allocates the gradients of keys and values for each head. cuDNN's kernel is assumed to take as much.
    The memory-efficient kernel has the same two (`workspace_elements_gq` in mem_eff_attention/kernel_backward.h, and
    delta), and before them a product of the output's size, which is not larger.
    """
    (batch, heads, rows), (_, groups, keys, width) = query[:3], key
    sums = 4 * batch * heads * (-(-rows // 128) * 128) * (rounded(max(width, value_width)) + 1)
    return sums + (heads != groups) * batch * heads * keys * (width + value_width) * element
