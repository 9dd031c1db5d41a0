"""Which kernel PyTorch's fused operator runs on an NVIDIA GPU, where no mask tensor and no dropout is given.

From aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: cuDNN's comes first on compute capability 9.0 and 10.x with a
cuDNN above 9.15 (`check_prefer_cudnn_attention`; the wheels of PyTorch 2.11 and later for CUDA 13 bring one), else
FlashAttention-2 (`can_use_flash_attention`). What neither takes is left out here: the kernels behind them are slower,
and the last one holds all scores.
"""

from __future__ import annotations

from collections.abc import Sequence

CUDNN, FLASH = "cudnn", "flash-attention-2"
PREFERRED = 91500  # a version of cuDNN must be above it
DTYPES = ("float16", "bfloat16")
LEAST_CAPABILITY, MOST_CAPABILITY = 80, 121  # of FlashAttention-2's kernels
MULTIPLE = 8  # of a head width; others are copied to the next one
CUDNN_WIDTH, FLASH_WIDTH = 128, 256
# Of the smaller shared memories, FlashAttention-2's backward pass runs no width in between.
SMALL, BETWEEN = (86, 89, 120, 121), range(193, 225)


def kernel(dtype: str, capability: int, head_dim: int, value_width: int, cudnn: bool = True) -> str | None:
    """CUDNN, FLASH or None. `cudnn`: whether cuDNN's kernel comes first where it has one."""
    if dtype not in DTYPES or not LEAST_CAPABILITY <= capability <= MOST_CAPABILITY:
        return None
    if head_dim % MULTIPLE or value_width % MULTIPLE:
        return None
    if cudnn and capability // 10 in (9, 10) and max(head_dim, value_width) <= CUDNN_WIDTH:
        return CUDNN
    if head_dim != value_width or head_dim > FLASH_WIDTH or (capability in SMALL and head_dim in BETWEEN):
        return None
    return FLASH


def rounded(width: int) -> int:
    """The head width that the kernels compute with: FlashAttention-2 has one for each multiple of 32."""
    return -(-width // 32) * 32


def workspace(query: Sequence[int], key: Sequence[int], value_width: int, element: int) -> int:
    """Bytes that the backward pass takes beyond operands, logsumexp and gradients; `query` is (B, H, T, ...) and `key`
    (B, G, S, D).

    FlashAttention-2 (mha_bwd in flash_api.cpp): the query's gradient in float32 and a sum for each row, of rows padded
    to 128; where heads share keys, the gradients of each. cuDNN's is taken to be no other.
    """
    (batch, heads, rows), (_, groups, keys, width) = query[:3], key
    sums = 4 * batch * heads * (-(-rows // 128) * 128) * (rounded(max(width, value_width)) + 1)
    return sums + (heads != groups) * batch * heads * keys * (width + value_width) * element


__all__ = ["CUDNN", "FLASH", "PREFERRED", "kernel", "rounded", "workspace"]
