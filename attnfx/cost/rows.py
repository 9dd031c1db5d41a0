"""What a CPU takes for a region of whole rows: nanoseconds per score of one thread, and operator by operator.

The original is as Inductor compiles it: whatever lies between two products or sorts is one pass over memory. In chunks
each operator is a pass of its own, but over numbers that are in a cache; in training the chunks are computed twice.
Fitted to single operators on chunks and on whole score matrices, and to talking heads and the best keys, forward and
training (12 heads x 4096 x 64, float32, one thread of an AMD EPYC); these eight times it gives within 25%.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnfx.report import Candidate

PRODUCT = 0.040  # per number that is added up: a product with keys or values
MIX = {"kept": 1.2, "chunked": 0.7}  # one of scores with a small matrix
SORTS = {"topk": 3.4, "kthvalue": 3.4, "sort": 59.0, "argsort": 59.0, "msort": 59.0, "median": 3.4, "mode": 59.0}
PASSES = {"softmax": 0.6, "masked_fill": 2.5, "exp": 0.8, "cumsum": 1.0}  # in chunks; others take PASS
PASS = 0.4
MEMORY = 2.7  # the original's pass between two products or sorts, where the scores lie in memory
FUSED = 2  # operators in such a pass
CACHE = 64 << 20  # bytes of scores, from which on they do
CALL = 1e4  # ns of an operator on one chunk
CHUNK = 8 << 20  # bytes of scores in a chunk


def candidates(
    work: Mapping[str, int], values: int, element: int, width: int, training: bool, threads: int
) -> tuple[Candidate, Candidate]:
    """(the original, the chunks), with times in ms and bytes beyond inputs and outputs.

    `work` counts the operators on values of the scores' size by name, "product" and "mix" among them; `values` is the
    number of scores, of `element` bytes each, and `width` that of a head.
    """
    products, mixes = PRODUCT * width * work.get("product", 0), work.get("mix", 0)
    sorts = sum(SORTS[op] * n for op, n in work.items() if op in SORTS)
    plain = {op: n for op, n in work.items() if op not in SORTS and op not in ("product", "mix")}
    passes = sum(PASSES.get(op, PASS) * n for op, n in plain.items())
    breaks = work.get("product", 0) + mixes + sum(n for op, n in work.items() if op in SORTS)
    fused = min(-(-sum(plain.values()) // FUSED), max(breaks - 1, 1)) * MEMORY if values * element >= CACHE else passes
    kept = products + sorts + MIX["kept"] * mixes + fused
    chunked = products + sorts + MIX["chunked"] * mixes + passes
    if training:
        kept += 2 * (products + MIX["kept"] * mixes) + fused
        chunked += chunked + 2 * (products + MIX["chunked"] * mixes) + passes
    calls = -(-values * element // CHUNK) * sum(work.values()) * CALL * (4 if training else 1)
    held = 2 * values * element  # the scores and the weights are alive together
    return (
        Candidate("kept", "inductor", values * kept / threads / 1e6, held),
        Candidate("chunked", "rows", (values * chunked / threads + calls) / 1e6, min(6 * CHUNK, held)),
    )


__all__ = ["candidates"]
