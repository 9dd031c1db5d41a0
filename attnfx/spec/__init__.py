"""Describe the computation of a kernel: one attention as a score program, or whole rows as a row program."""

from attnfx.spec.attention import (
    AXES,
    UNKNOWN_SIZE,
    AttentionSpec,
    B,
    Capture,
    H,
    I,
    J,
    additive,
    canonical,
    fill_of,
    from_json,
    loads,
    reads_pairs,
)

__all__ = [
    "AXES", "UNKNOWN_SIZE", "AttentionSpec", "B", "Capture", "H", "I", "J", "additive", "canonical", "fill_of",
    "from_json", "loads", "reads_pairs",
]  # fmt: skip
