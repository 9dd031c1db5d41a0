"""What a CPU takes for a site: for each way of computing it, a sum of what there is to do times what one of it takes.

The rates are fitted to benchmarks/results/grid.json by `python benchmarks/grid.py --fit`, which prints this file's
table (AMD EPYC with 32 MiB of shared cache, one thread's own time). Other processors differ in the rates, less in the
ratios that decide; `attnfx bench --calibrate` corrects them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from attnfx.cost.question import Question
from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr, walk
from attnfx.mask import key_ranges
from attnfx.report import Candidate
from attnfx.spec import AttentionSpec, I, J, additive


@dataclass(frozen=True)
class Rates:
    """Nanoseconds of one thread.

    call     of a call, and again where a score program must be evaluated in it
    block    of each block of queries
    operand  of an element of query, key, value and output: copies and the first pass through memory
    score    of a score that is computed, whatever the width
    width    of a score and unit of head width: the two contractions
    spilled  of a score that does not fit into the shared cache
    program  of a score and operation of the score program beyond a scaled product
    half     of a score where operands have two bytes
    """

    call: float = 0.0
    block: float = 0.0
    operand: float = 0.0
    score: float = 0.0
    width: float = 0.0
    spilled: float = 0.0
    program: float = 0.0
    half: float = 0.0


# The original under Inductor, the same where Inductor's own patterns make it a fused call, and the tiers; forward, and
# forward and backward together.
FORWARD = {
    "inductor": Rates(call=2e4, score=1.9, width=0.036, spilled=2.2),
    "fused": Rates(score=0.5, width=0.0415),
    "library": Rates(call=2.5e5, block=6e4, score=0.5, width=0.0415, program=1.0),
    "chunked": Rates(call=4e5, block=6e4, score=5.2, width=0.040),
    "sums": Rates(call=4e5, block=6e4, score=2.5, width=0.020),
}
TRAINING = {
    "inductor": Rates(call=6e4, score=5.7, width=0.108, spilled=6.6),
    "fused": Rates(score=1.7, width=0.14),
    "library": Rates(call=8.5e5, block=2e5, score=1.7, width=0.14, program=3.4),
    "chunked": Rates(call=1.4e6, block=2e5, score=17.7, width=0.136),
    "sums": Rates(call=1.2e6, block=1.9e5, score=7.8, width=0.062),
}

CAUSAL, ZERO = A.ge(I, J), A.const(0.0)
SHARED_CACHE = 32 << 20  # bytes
BLOCK = 256  # queries in a block, as kernels/library.py cuts them; kernels/chunked.py cuts some in two
KEYS = 512  # that PyTorch's operator takes at a time: under its own causality it skips no less
# Inductor's patterns know some spellings of a site and not others, and the spec does not tell which. Where a rewrite
# would take more than this share of the fused call's time, the site counts as known; else as not known.
ALIKE = 1.03


def work(ask: Question, way: str) -> Rates:
    """How much of each rate a way of computing a site has to do, on one thread."""
    dims, scores = ask.dims, ask.scores
    width = (dims["D"] + dims["Dv"]) / 2
    operand = dims["B"] * (dims["H"] * dims["T"] + dims["G"] * dims["S"]) * (dims["D"] + dims["Dv"])
    spilled, computed, blocks = 0.0, float(scores), 1
    operations = _operations(ask.spec.score)
    if way == "inductor":  # scores and weights are alive together
        spilled = scores * min(1.0, max(0.0, 2.0 * scores * ask.element / SHARED_CACHE - 1.0))
    elif way != "fused":
        share, blocks = _live(ask.spec, tuple(ask.dims.items()), way == "library")
        computed = scores * share
    if way == "library":
        operations = _mask(ask.spec).added
    halves = computed if ask.element == 2 else 0.0
    calls = 2.0 if operations and way in ("library", "chunked") else 1.0
    return Rates(calls, blocks - 1, operand, computed, computed * width, spilled, computed * operations, halves)


def time(ask: Question, way: str, threads: int, rates: Mapping[str, Rates] | None = None) -> float:
    """Predicted ms of a call; of a step where a backward pass follows. `rates` are those of the present direction."""
    rate = (rates or (TRAINING if ask.training else FORWARD))[way]
    todo = work(ask, way)
    shared = sum(getattr(todo, name) * getattr(rate, name) for name in vars(rate) if name not in ("call", "block"))
    return (shared / threads + todo.call * rate.call + todo.block * rate.block) / 1e6


def candidates(ask: Question, threads: int) -> tuple[Candidate, list[Candidate]]:
    """(the original, the rewrites that can run) with their predicted times (ms) and bytes beyond inputs and output."""
    dims, scores = ask.dims, ask.scores
    again = ask.sums * time(ask, "sums", threads)
    rows = dims["B"] * dims["H"] * 4
    out: list[Candidate] = []
    if ask.can("library"):
        ms = time(ask, "library", threads)
        if ask.training and any(c.grad for c in ask.spec.captures):  # its backward pass gives captures no gradient
            forward = replace(ask, training=False)
            ms = time(ask, "chunked", threads) - time(forward, "chunked", threads) + time(forward, "library", threads)
        tile = rows * min(dims["T"], BLOCK) * (dims["S"] if _mask(ask.spec).tiled else 1)
        out.append(Candidate("library", "flash_attention_for_cpu", ms + again, tile))
    if ask.can("chunked"):
        block = min(scores, 1 << 20) * 4 * 3
        out.append(Candidate("chunked", "blocks", time(ask, "chunked", threads) + again, block))
    return _kept(ask, threads, out), out


def _kept(ask: Question, threads: int, others: list[Candidate]) -> Candidate:
    fused = time(ask, "fused", threads)
    if ask.native:
        return Candidate("kept", "aten", fused, 0)
    ms = time(ask, "inductor", threads)
    known = not ask.spec.random and ask.spec.score.op != "where" and not ask.spec.extra
    if known and all(c.predicted_ms > ALIKE * fused for c in others):
        ms = min(ms, fused)
    return Candidate("kept", "inductor", ms, 2 * ask.scores * ask.element)


@lru_cache(maxsize=1024)
def _operations(score: Expr) -> int:
    """Operations on every score, beyond one scaled product."""
    found = [e for e in walk(score) if e.args and ("j" in e.free or _has_dot(e)) and e.kind != "i"]
    return max(0, len(found) - 1)


def _has_dot(e: Expr) -> bool:
    return any(x.op == "dot" for x in walk(e))


@dataclass(frozen=True)
class _Mask:
    """What PyTorch's operator is given of a site.

    causal  its own causality, in one call for all queries
    added   how often a score is touched by what is added: 0 nothing, a part for one row for all queries, 1 for a tile,
            2 for one of each head
    tiled   what is added differs by query, so that each block of queries is a call
    """

    causal: bool
    added: float
    tiled: bool


@lru_cache(maxsize=1024)
def _mask(spec: AttentionSpec) -> _Mask:
    found = additive(spec.score)
    if found is None:
        return _Mask(False, 2.0, True)
    _, bias, keep = found
    conjuncts = () if keep is None else keep.args if keep.op == "and" else (keep,)
    rest = [e for e in conjuncts if e is not CAUSAL]
    if bias is not ZERO:
        rest.append(bias)
    tiled = any("i" in e.free for e in rest)
    added = 0.0 if not rest else 0.25 if not tiled else 2.0 if any({"b", "h"} & e.free for e in rest) else 1.0
    return _Mask(CAUSAL in conjuncts and not tiled, added, tiled)


@lru_cache(maxsize=1024)
def _live(spec: AttentionSpec, items: tuple[tuple[str, int], ...], fused: bool) -> tuple[float, int]:
    """(share of the scores that is computed, number of blocks); `fused` by PyTorch's operator."""
    dims, mask = dict(items), _mask(spec)
    if fused and not (mask.causal or mask.tiled):
        return 1.0, 1
    ranges = key_ranges(spec, dims, BLOCK)
    step = KEYS if fused and mask.causal else 1
    total = sum((r.i1 - r.i0) * min(-(-(r.j1 - r.j0) // step) * step, dims["S"]) for r in ranges)
    return total / max(dims["T"] * dims["S"], 1), 1 if fused and mask.causal else max(len(ranges), 1)


__all__ = ["FORWARD", "TRAINING", "Rates", "candidates", "time", "work"]
