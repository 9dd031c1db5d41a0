"""Predict the time of a region of whole rows: under Inductor, in chunks call by call, in chunks with a compiled body.

On a CPU, the rates are nanoseconds of one thread per score and operator. They are fitted to single operators on chunks
and on whole score matrices, and to talking heads and top-k keys, forward and training (12 heads x 4096 x 64, float32,
one thread of an AMD EPYC). The model is within 25% of these twelve times.

On a GPU, times come from the rates of its record. The operators between two products or sorts are one pass over the
scores: through memory for the original, through the last cache if a chunk fits there. No GPU was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnfx.ir.expr import Expr
from attnfx.mask import key_ranges
from attnfx.report.records import Candidate
from attnfx.targets import Target

CALLS, COMPILED = "rows", "rows compiled"  # kernels: separate calls, or a body compiled by Inductor

PRODUCT = {"kept": 0.040, CALLS: 0.040, COMPILED: 0.033}  # per multiply-add of a product with keys or values
MIX = {"kept": 1.2, CALLS: 0.7, COMPILED: 0.7}  # product of the scores with a small matrix
SORTS = {"topk": 3.4, "kthvalue": 3.4, "sort": 59.0, "argsort": 59.0, "msort": 59.0, "median": 3.4, "mode": 59.0}
PASSES = {"softmax": 0.6, "masked_fill": 2.5, "exp": 0.8, "cumsum": 1.0}  # call by call; others take PASS
PASS = 0.4
FUSED_PASSES = {"softmax": 0.6, "exp": 0.6, "cumsum": 1.0}  # in a compiled body; others take FUSED_PASS
FUSED_PASS = 0.25
MEMORY = 2.7  # pass of the original over scores in memory, between two products or sorts
FUSED = 2  # operators in such a pass
CACHE = 64 << 20  # bytes: larger scores are in memory, not in a cache, and a compiled body is worth its compile time
CALL = 1e4  # ns of an operator call on one chunk
CHUNK = {"cpu": 16 << 20, "gpu": 256 << 20}  # bytes of scores in a chunk
HELD = 6  # values of this size alive in a chunk
BLOCKS, WIDTHS = 32, 4  # chunks of rows to analyze for their keys; parts of the keys that a chunk takes or skips whole

GPU_PRODUCTS = 0.75  # share of the rates that batched products of attention's shapes reach; an estimate
GPU_SORTS = {"topk": 8, "kthvalue": 8, "sort": 24, "argsort": 24, "msort": 24, "median": 8, "mode": 24}  # passes (est.)
CACHE_SHARE = 0.5  # share of the last cache that a chunk's scores may fill for the next kernel to find them there


@dataclass(frozen=True)
class Rows:
    """A region of whole rows.

    work     for each operator, by name, how often it runs on values of the scores' size; includes "product" (with
             queries, keys or values) and "mix" (with a small matrix)
    values   number of scores, `element` bytes each
    width    of a head
    device   kind of device that would run it
    live     share of the scores that chunks compute
    """

    work: Mapping[str, int]
    values: int
    element: int
    width: int
    training: bool
    device: str = "cpu"
    live: float = 1.0

    @property
    def bytes(self) -> int:
        return self.values * self.element

    def plain(self) -> dict[str, int]:
        """Return the operators other than products, mixes and sorts."""
        return {op: n for op, n in self.work.items() if op not in SORTS and op not in ("product", "mix")}

    def passes(self) -> int:
        """Return the number of passes of the original over the scores between products and sorts."""
        breaks = sum(self.work.values()) - sum(self.plain().values())
        return min(-(-sum(self.plain().values()) // FUSED), max(breaks - 1, 1))


def candidates(ask: Rows, threads: int = 1, device: Target | None = None) -> tuple[Candidate, list[Candidate]]:
    """Return (the original, the ways in chunks) with times in ms and bytes beyond inputs and outputs. `device` is a
    GPU; None means a CPU whose `threads` share the work."""
    return _on_cpu(ask, threads) if device is None else _on_gpu(ask, device)


def _on_cpu(ask: Rows, threads: int) -> tuple[Candidate, list[Candidate]]:
    count, mixes = ask.width * ask.work.get("product", 0), ask.work.get("mix", 0)
    sorts = sum(SORTS[op] * n for op, n in ask.work.items() if op in SORTS)
    held = 2 * ask.bytes  # the scores and the weights are alive at the same time
    alone = sum(PASSES.get(op, PASS) * n for op, n in ask.plain().items())
    fused = sum(FUSED_PASSES.get(op, FUSED_PASS) * n for op, n in ask.plain().items())

    products = PRODUCT["kept"] * count + MIX["kept"] * mixes
    between = ask.passes() * MEMORY if ask.bytes >= CACHE else alone
    kept = products + sorts + between + (2 * products + between if ask.training else 0)
    ways = []
    for kernel, passes in ((CALLS, alone), (COMPILED, fused)):
        if kernel == COMPILED and ask.bytes < CACHE:
            continue
        products = PRODUCT[kernel] * count + MIX[kernel] * mixes
        last = PRODUCT[kernel] * ask.width if kernel == COMPILED else 0.0
        time = products + sorts + passes
        if ask.training:  # forward again without the last product, and gradients
            time = 2 * time - last + 2 * products + passes
        calls = -(-ask.bytes // CHUNK["cpu"]) * sum(ask.work.values()) * CALL * (4 if ask.training else 1)
        ms = (ask.live * ask.values * time / threads + calls) / 1e6
        ways.append(Candidate("chunked", kernel, ms, min(HELD * CHUNK["cpu"], held)))
    return Candidate("kept", "inductor", ask.values * kept / threads / 1e6, held), ways


def _on_gpu(ask: Rows, device: Target) -> tuple[Candidate, list[Candidate]]:
    dtype = {2: "bfloat16", 4: "float32"}.get(ask.element, "float32")
    rate = GPU_PRODUCTS * device.rate(dtype) * 1e9  # operations in a ms
    product = 2 * ask.values * ask.width / rate
    chunk, held = min(CHUNK["gpu"], ask.bytes), 2 * ask.bytes
    cached = device.l2_bandwidth if chunk <= CACHE_SHARE * device.l2 else device.bandwidth
    sorts = sum(GPU_SORTS[op] * n for op, n in ask.work.items() if op in SORTS)
    mixes, products = ask.work.get("mix", 0), ask.work.get("product", 0)
    passes = ask.passes()
    # each product, mix, sort and pass reads or writes the scores: a mix and a pass do both
    touched = products + 2 * (mixes + passes) + sorts

    def times(bandwidth: float, again: bool) -> float:
        each = ask.bytes / (bandwidth * 1e6)
        forward = products * product + touched * each
        gradients = 2 * (products * product + (products + 2 * mixes) * each) + 2 * passes * each
        if not ask.training:
            return forward
        return forward + gradients + (forward - product if again else 0.0)

    kernels = sum(ask.work.values()) * (4 if ask.training else 1)
    launches = -(-ask.bytes // max(chunk, 1)) * kernels * device.launch / 1e3
    kept = Candidate("kept", "inductor", times(device.bandwidth, False) + kernels * device.launch / 1e3, held)
    return kept, [Candidate("chunked", COMPILED, ask.live * times(cached, True) + launches, min(HELD * chunk, held))]


def live_share(score: Expr, rows: int, columns: int) -> float:
    """Return the share of the scores that chunks compute: a chunk takes every key that one of its rows may see. `score`
    is where(key may be live, 0, -inf)."""
    blocks = key_ranges(score, {"B": 1, "H": 1, "T": rows, "S": columns}, max(rows // BLOCKS, 1))
    step = -(-columns // WIDTHS) or 1
    taken = sum((r.i1 - r.i0) * (min(-(-r.j1 // step) * step, columns) - r.j0 // step * step) for r in blocks)
    return taken / max(rows * columns, 1)


KERNELS = (CALLS, COMPILED)
