"""What a region of whole rows takes: as it is under Inductor, in chunks call by call, in chunks with a compiled body.

On a CPU nanoseconds per score of one thread, operator by operator, fitted to single operators on chunks and on whole
score matrices, and to talking heads and the best keys, forward and training (12 heads x 4096 x 64, float32, one thread
of an AMD EPYC); these twelve times it gives within 25%. On a GPU, from the rates of its record: what lies between two
products or sorts is one pass over the scores, through memory for the original and through the last cache where a chunk
fits in it. No GPU was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnfx.ir.expr import Expr
from attnfx.mask import key_ranges
from attnfx.report.records import Candidate
from attnfx.targets import Target

CALLS, COMPILED = "rows", "rows compiled"  # kernels: each call by itself, or a body that Inductor made

PRODUCT = {"kept": 0.040, CALLS: 0.040, COMPILED: 0.033}  # per number that is added up: a product with keys or values
MIX = {"kept": 1.2, CALLS: 0.7, COMPILED: 0.7}  # one of scores with a small matrix
SORTS = {"topk": 3.4, "kthvalue": 3.4, "sort": 59.0, "argsort": 59.0, "msort": 59.0, "median": 3.4, "mode": 59.0}
PASSES = {"softmax": 0.6, "masked_fill": 2.5, "exp": 0.8, "cumsum": 1.0}  # call by call; others take PASS
PASS = 0.4
FUSED_PASSES = {"softmax": 0.6, "exp": 0.6, "cumsum": 1.0}  # in a body
FUSED_PASS = 0.25
MEMORY = 2.7  # the original's pass between two products or sorts, where the scores lie in memory
FUSED = 2  # operators in such a pass
CACHE = 64 << 20  # bytes of scores, from which on they do, and a body is worth the seconds that compiling takes
CALL = 1e4  # ns of an operator on one chunk
CHUNK = {"cpu": 16 << 20, "gpu": 256 << 20}  # bytes of scores in a chunk
HELD = 6  # values of their size that a chunk has alive
BLOCKS, WIDTHS = 32, 4  # chunks of rows that are asked for their keys; how many numbers of keys chunks have

GPU_PRODUCTS = 0.75  # share of the rates that batched products of attention's shapes hold; an estimate
GPU_SORTS = {"topk": 8, "kthvalue": 8, "sort": 24, "argsort": 24, "msort": 24, "median": 8, "mode": 24}  # passes; too
CACHE_SHARE = 0.5  # of the last cache that a chunk's scores may take, to be found there by the next kernel


@dataclass(frozen=True)
class Rows:
    """A region: how often each operator works on values of the scores' size, by name, "product" (with queries, keys or
    values) and "mix" (with a small matrix) among them; the number of scores, of `element` bytes each; the width of a
    head; the kind of device that it would run on; and the share of the scores that chunks compute."""

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
        """The operators that are neither products nor sorts."""
        return {op: n for op, n in self.work.items() if op not in SORTS and op not in ("product", "mix")}

    def passes(self) -> int:
        """How often the original goes over the scores between two products or sorts."""
        breaks = sum(self.work.values()) - sum(self.plain().values())
        return min(-(-sum(self.plain().values()) // FUSED), max(breaks - 1, 1))

    def several(self, forward: float, last: float, products: float, passes: float) -> float:
        """The time of a step in chunks: the forward pass; again, without the `last` product; the gradients."""
        return forward if not self.training else 2 * forward - last + 2 * products + passes


def candidates(ask: Rows, threads: int = 1, device: Target | None = None) -> tuple[Candidate, list[Candidate]]:
    """(the original, the ways in chunks), with times in ms and bytes beyond inputs and outputs; `device` is a GPU, None
    a CPU whose `threads` share the work."""
    return _on_cpu(ask, threads) if device is None else _on_gpu(ask, device)


def _on_cpu(ask: Rows, threads: int) -> tuple[Candidate, list[Candidate]]:
    count, mixes = ask.width * ask.work.get("product", 0), ask.work.get("mix", 0)
    sorts = sum(SORTS[op] * n for op, n in ask.work.items() if op in SORTS)
    held = 2 * ask.bytes  # the scores and the weights are alive together
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
        time = ask.several(products + sorts + passes, last, products, passes)
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
    """The share of the scores that chunks compute, which take the keys that some row of theirs may see: where(the key
    may be live, 0, -inf) in `score`."""
    blocks = key_ranges(score, {"B": 1, "H": 1, "T": rows, "S": columns}, max(rows // BLOCKS, 1))
    step = -(-columns // WIDTHS) or 1
    taken = sum((r.i1 - r.i0) * (min(-(-r.j1 // step) * step, columns) - r.j0 // step * step) for r in blocks)
    return taken / max(rows * columns, 1)


KERNELS = (CALLS, COMPILED)
