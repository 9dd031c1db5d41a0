"""Which kernel PyTorch's fused operator runs on an NVIDIA GPU, where no dropout is given.

From aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: cuDNN's comes first on compute capability 9.0 and 10.x with a
cuDNN above 9.15 (`check_prefer_cudnn_attention`; the wheels of PyTorch 2.11 and later for CUDA 13 bring one), then
FlashAttention-2 (`can_use_flash_attention`), then the memory-efficient kernel of xFormers, made with CUTLASS
(`can_use_mem_efficient_attention`). What none of them takes holds all scores.

The memory-efficient kernel multiplies float32 in three TF32 products from 8.0 on (`OpMultiplyAddFastF32` in
mem_eff_attention/gemm_kernel_utils.h), which keeps float32's accuracy, and with plain arithmetic before.
"""

from __future__ import annotations

from collections.abc import Sequence

CUDNN, FLASH, EFFICIENT = "cudnn", "flash-attention-2", "memory-efficient"
PREFERRED = 91500  # a version of cuDNN must be above it
DTYPES = ("float16", "bfloat16")
LEAST_CAPABILITY, MOST_CAPABILITY = 80, 121  # of FlashAttention-2's kernels
MULTIPLE = 8  # of a head width; others are copied to the next one
CUDNN_WIDTH, FLASH_WIDTH = 128, 256
# Of the smaller shared memories, FlashAttention-2's backward pass runs no width in between.
SMALL, BETWEEN = (86, 89, 120, 121), range(193, 225)
# The memory-efficient kernel: the oldest GPU with matrix instructions that it uses (older ones are no targets here),
# and what it pads the rows of a logsumexp to.
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
    """CUDNN, FLASH, EFFICIENT or None. `cudnn`: whether cuDNN's kernel comes first where it has one; `grouped`: whether
    heads share keys; `plain`: there is no mask tensor, and where it is causal as many queries as keys."""
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
    """Whether the memory-efficient kernel has a form for such operands. Heads that share keys are left out: some
    versions of PyTorch copy their keys, others then hold all scores."""
    least = {"float32": LEAST_EFFICIENT, "float16": LEAST_EFFICIENT, "bfloat16": LEAST_CAPABILITY}.get(dtype)
    if least is None or capability < least:
        return False
    # `minimum_gemm_alignment`: 16 bytes for matrix instructions
    step = MULTIPLE if dtype in DTYPES else 4 if capability >= LEAST_CAPABILITY else 1
    return not (head_dim % step or value_width % step)


def rounded(width: int) -> int:
    """The head width that the kernels compute with: FlashAttention-2 has one for each multiple of 32."""
    return -(-width // 32) * 32


def logsumexp(name: str, rows: int) -> int:
    """Rows of the logsumexp that a kernel gives for the backward pass, of so many queries."""
    return -(-rows // LOGSUMEXP_ROWS) * LOGSUMEXP_ROWS if name == EFFICIENT else rows


def workspace(query: Sequence[int], key: Sequence[int], value_width: int, element: int) -> int:
    """Bytes that the backward pass takes beyond operands, logsumexp and gradients; `query` is (B, H, T, ...) and `key`
    (B, G, S, D).

    FlashAttention-2 (mha_bwd in flash_api.cpp): the query's gradient in float32 and a sum for each row, of rows padded
    to 128; where heads share keys, the gradients of each. cuDNN's is taken to be no other. The memory-efficient kernel
    has the same two (`workspace_elements_gq` in mem_eff_attention/kernel_backward.h, and delta), and first a product of
    the output's size, which is no larger.
    """
    (batch, heads, rows), (_, groups, keys, width) = query[:3], key
    sums = 4 * batch * heads * (-(-rows // 128) * 128) * (rounded(max(width, value_width)) + 1)
    return sums + (heads != groups) * batch * heads * keys * (width + value_width) * element
