"""Predict the kernel that PyTorch's fused operator runs on an NVIDIA GPU without dropout.

From aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: cuDNN's comes first on compute capability 9.0 and 10.x with a
cuDNN above 9.15 (`check_prefer_cudnn_attention`; the wheels of PyTorch 2.11 and later for CUDA 13 include one), then
FlashAttention-2 (`can_use_flash_attention`), then the memory-efficient kernel of xFormers, built with CUTLASS
(`can_use_mem_efficient_attention`). For inputs that none of them accepts, PyTorch materializes all scores.

From 8.0 on, the memory-efficient kernel computes a float32 product as three TF32 products (`OpMultiplyAddFastF32` in
mem_eff_attention/gemm_kernel_utils.h), which keeps float32's accuracy. On older GPUs it uses plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

CUDNN, FLASH, EFFICIENT = "cudnn", "flash-attention-2", "memory-efficient"
PREFERRED = 91500  # cuDNN's kernel is preferred above this version of cuDNN
DTYPES = ("float16", "bfloat16")
LEAST_CAPABILITY, MOST_CAPABILITY = 80, 121  # of FlashAttention-2's kernels
MULTIPLE = 8  # head widths are multiples of it; others are copied to the next one
CUDNN_WIDTH, FLASH_WIDTH = 128, 256
# On GPUs with less shared memory (SMALL), FlashAttention-2's backward pass does not run these widths.
SMALL, BETWEEN = (86, 89, 120, 121), range(193, 225)
# The memory-efficient kernel: the oldest GPU with matrix instructions that it uses (older ones are not targets here),
# and the multiple to which it pads the rows of a logsumexp.
LEAST_EFFICIENT, LOGSUMEXP_ROWS = 70, 32


def kernel(
    dtype: str,
    capability: int,
    head_dim: int,
    value_width: int,
    cudnn: bool = True,
    grouped: bool = False,
    plain: bool = True,
) -> str | None:
    """Return CUDNN, FLASH, EFFICIENT or None. `cudnn` is whether PyTorch prefers cuDNN's kernel if it applies;
    `grouped` is whether heads share keys; `plain` is whether the call lacks a mask tensor and, if causal, has as many
    queries as keys."""
    if not capability <= MOST_CAPABILITY:
        return None
    half = dtype in DTYPES and capability >= LEAST_CAPABILITY and not (head_dim % MULTIPLE or value_width % MULTIPLE)
    if half and cudnn and capability // 10 in (9, 10) and max(head_dim, value_width) <= CUDNN_WIDTH:
        return CUDNN
    small = capability in SMALL and head_dim in BETWEEN
    if half and plain and head_dim == value_width <= FLASH_WIDTH and not small:
        return FLASH
    return EFFICIENT if _efficient(dtype, capability, head_dim, value_width) and not grouped else None


def _efficient(dtype: str, capability: int, head_dim: int, value_width: int) -> bool:
    """Return whether the memory-efficient kernel supports such operands. It is not used if heads share keys: some
    versions of PyTorch then copy the keys, others materialize all scores."""
    least = {"float32": LEAST_EFFICIENT, "float16": LEAST_EFFICIENT, "bfloat16": LEAST_CAPABILITY}.get(dtype)
    if least is None or capability < least:
        return False
    # `minimum_gemm_alignment`: 16 bytes for matrix instructions
    step = MULTIPLE if dtype in DTYPES else 4 if capability >= LEAST_CAPABILITY else 1
    return not (head_dim % step or value_width % step)


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
