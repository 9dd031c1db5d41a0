"""Register the operators that a rewritten graph calls."""

import torch

from attnfx.kernels.operators import attention, mask_summary, rows, weights

ATTENTION = torch.ops.attnfx.attention.default
WEIGHTS = torch.ops.attnfx.attention_weights.default
LARGEST_WEIGHTS = torch.ops.attnfx.attention_weights_max.default
MASK_SUMMARY = torch.ops.attnfx.mask_summary.default
ROWS = torch.ops.attnfx.attention_rows.default

__all__ = [
    "ATTENTION", "LARGEST_WEIGHTS", "MASK_SUMMARY", "ROWS", "WEIGHTS", "attention", "mask_summary", "rows", "weights",
]  # fmt: skip
