"""Compute any score program in chunks of queries by ATen's own operators, recomputed in the backward pass."""
