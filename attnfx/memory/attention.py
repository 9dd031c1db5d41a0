"""What the attention operators take while they run, beyond their operands and results. Sizes as in a spec's dims."""

from __future__ import annotations

from collections.abc import Mapping

from attnfx.mask import describe
from attnfx.spec import AttentionSpec

# kernels/library.py: queries of a block; kernels/chunked.py: elements of a tile of scores
BLOCK, TILE = 256, {"cpu": 1 << 20, "cuda": 1 << 26}
# Tensors of a tile's size that are alive at once in kernels/chunked.py: scores, weights and the mask's parts; in the
# backward pass the gradients of scores and weights beside them; one more for what dropout keeps, one for a mask.
CHUNK, CHUNK_BACKWARD = 3, 5


def _causal(spec: AttentionSpec, dims: Mapping[str, int]) -> bool:
    """Whether the mask is the fused kernel's own; a window shows at sizes that are larger than it."""
    return describe(spec, {**dims, "T": 1 << 20, "S": 1 << 20}) == "causal"


def workspace(
    spec: AttentionSpec, dims: Mapping[str, int], element: int, tier: str, backward: bool, cpu: bool
) -> int:  # fmt: skip
    """Bytes alive only while one call runs. `dims` holds B, H, G, T, S, D, Dv; `element` is bytes of a number."""
    rows = dims["B"] * dims["H"] * dims["T"]
    scores = rows * dims["S"]
    if tier == "library":
        whole = rows * dims["Dv"] * element
        names = {n for e in spec.programs for n in e.free}
        if "i" not in names or _causal(spec, dims):
            return whole  # the fused kernel's own result, before it becomes the operator's
        block = min(BLOCK, dims["T"])
        each = (dims["B"] if "b" in names else 1) * (dims["H"] if "h" in names else 1)
        tile = block * dims["S"] * (8 + 10 * each)  # positions as int64; the mask, the one before, what it is made of
        part = whole * block // max(dims["T"], 1)
        if not backward:
            return tile + part
        return tile + part + dims["B"] * dims["G"] * dims["S"] * (dims["D"] + dims["Dv"]) * 4
    if tier in ("flash", "decode"):
        # the backward pass adds up row sums of out * grad_out, a float32 a row; a split writes float32 partial results
        return 4 * rows if backward else (4 * rows * (dims["Dv"] + 2) if tier == "decode" else 0)
    tile = min(scores, TILE["cpu" if cpu else "cuda"]) * 4
    more = bool(spec.dropout) + ("i" in spec.score.free)
    return tile * ((CHUNK_BACKWARD if backward else CHUNK) + more)
