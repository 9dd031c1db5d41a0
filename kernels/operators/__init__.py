"""Register the operators that a rewritten graph calls."""

from attnfx.kernels.operators import attention, mask_summary, rows, weights

__all__ = ["attention", "mask_summary", "rows", "weights"]
