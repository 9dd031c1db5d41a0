"""Predict the time of a site on a CPU: for each way to compute it, the sum of its work items times their rates.

The rates are fitted to benchmarks/results/grid.json by `python benchmarks/grid.py --fit`, which prints this file's
tables (AMD EPYC with 32 MiB of shared cache, one thread's own time), and for decode steps to grid_decode.json (Intel
Xeon). Other processors have other rates, but the ratios that decide differ less. `attnfx bench --calibrate` corrects
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from attnfx.cost.query import Question
from attnfx.ir import algebra as A
from attnfx.ir.expr import FLOAT_UNARY, Expr, walk
from attnfx.mask import FLEX_TILE as TILE
from attnfx.mask import visited
from attnfx.report.records import Candidate
from attnfx.spec import AttentionSpec, I, J, additive, fill_of


@dataclass(frozen=True)
class Rates:
    """Nanoseconds of one thread per unit of work (also the type of the amounts of work themselves).

    call     per call, counted twice if the call must evaluate a score program
    operand  per element of query, key, value and output: the first pass through memory; for few queries, which spend
             most of their time on it, per four bytes
    copied   per such element if the batch is larger than one: in a model's layout, batch and heads do not merge into
             one axis, so batched products and Inductor's fused calls copy. For few queries, per element of two bytes,
             which some ways convert
    score    per computed score, at any head width
    width    per score and unit of head width: the two contractions
    repeated per element of keys and values that the original copies for each query head of a group, if the copies fit
             into the shared cache; on an Intel Xeon, 11 decode steps: 0.38 to 0.5, and 2.2 to 2.7 if they do not fit.
             With a single query, per element that each query head reads again, if a head's keys exceed a core's cache
    spilled  per score that does not fit into the shared cache
    program  per score and operation of the score program beyond a scaled product
    function per score and function of the score program: tanh, exp, ...
    draw     per random number of dropout, one for each score
    narrow   replaces `width` for operands of two bytes an element
    """

    call: float = 0.0
    operand: float = 0.0
    copied: float = 0.0
    score: float = 0.0
    width: float = 0.0
    repeated: float = 0.0
    spilled: float = 0.0
    program: float = 0.0
    function: float = 0.0
    draw: float = 0.0
    narrow: float = 0.0


# Rates of the original under Inductor, of the original if Inductor's own patterns make it a fused call, and of the
# tiers. FORWARD is the forward pass, TRAINING forward and backward together.
FORWARD = {
    # 42 points, mean error 7%
    "inductor": Rates(
        call=12500, copied=0.319, score=1.76, width=0.0421, repeated=0.45, spilled=1.64, program=0.303, function=2.09,
        narrow=0.0241,
    ),
    # 28 points, mean error 6%
    "fused": Rates(
        call=27300, operand=0.464, copied=0.711, score=0.483, width=0.0415, repeated=0.45, program=1.74,
        narrow=0.0488,
    ),
    # 67 points, mean error 7%
    "library": Rates(call=285000, operand=0.531, copied=0.107, score=0.701, width=0.0427, program=1.19, narrow=0.0486),
    # 70 points, mean error 13%
    "chunked": Rates(call=164000, operand=0.593, score=1.84, width=0.0574, program=0.741, function=1.82, narrow=0.0686),
    # 21 points of grid_flex.json in proportion to the fastest other contender, mean error 10%
    "flex": Rates(call=309000, operand=0.603, copied=1.4, width=0.106, function=1.52, narrow=0.0895),
    # one size, 12 heads x 2048 x 64: the grid does not contain sums of the weights
    "sums": Rates(call=400000, score=2.5, width=0.02),
}  # fmt: skip
# Rates of a forward pass with at most FEW queries, fitted to grid_decode.json (an Intel Xeon). "single" is the original
# with one query a head: Inductor computes its products as sums, which read through the repetition of keys.
DECODING = {
    # 34 points, mean error 18%
    "single": Rates(operand=0.257, copied=0.0517, score=7.04, width=0.0244, repeated=0.202, narrow=0.0851),
    # 45 points, mean error 18%
    "library": Rates(call=91100, operand=0.465, copied=0.266, score=1.72, width=0.0578, narrow=0.0239),
    # 45 points, mean error 16%
    "chunked": Rates(call=93500, operand=0.376, copied=0.96, score=2.51, width=0.0617, narrow=0.0587),
    # 45 points, mean error 22%
    "flex": Rates(operand=0.528, copied=0.125, score=7.15, width=0.0361, narrow=0.0384),
    # 11 points, mean error 2%
    "inductor": Rates(call=1.08e6, copied=0.638, score=0.794, width=0.0495, repeated=0.419),
    # 14 points, mean error 37%
    "fused": Rates(operand=0.1, width=0.0709, repeated=0.385),
}  # fmt: skip
TRAINING = {
    # 29 points, mean error 5%
    "inductor": Rates(
        call=829000, copied=1.57, score=2.71, width=0.178, spilled=4.79, program=0.248, function=2.44, draw=21.7,
        narrow=0.0834,
    ),
    # 7 points, mean error 3%
    "fused": Rates(call=689000, score=2.43, width=0.164, program=0.518),
    # 26 points, mean error 5%
    "library": Rates(call=1.42e6, operand=2.05, score=1.37, width=0.171, program=1.21, narrow=0.148),
    # 36 points, mean error 11%
    "chunked": Rates(
        call=1.24e6, operand=0.47, copied=0.132, score=8.28, width=0.243, program=0.294, function=6.24, draw=10.6,
        narrow=0.253,
    ),
    # one size, 12 heads x 2048 x 64: the grid does not contain sums of the weights
    "sums": Rates(call=1.2e6, score=7.8, width=0.062),
}  # fmt: skip

CAUSAL, ZERO = A.ge(I, J), A.const(0.0)
FEW = 16  # most queries of a decode step
COPIES = ("inductor", "fused")  # the ways of the original, which copies repeated keys and values
SHARED_CACHE, OWN_CACHE = 32 << 20, 1 << 20  # bytes; of all cores, and of one
COLD = 4.0  # further time of a repeated element beyond the shared cache, in its time within
BLOCK = 256  # queries in a block of kernels/library/cpu.py; kernels/chunked/blocks.py cuts some blocks in two
KEYS = 512  # keys that PyTorch's operator computes at a time: with is_causal it skips whole groups of this size
# Inductor's patterns match some spellings of a site and not others, and the spec does not record the spelling. If every
# rewrite would take more than this share of the fused call's time, the model assumes that Inductor matches the site,
# else that it does not. For plain sites both run the same operator, so a rewrite can lose more than it can save.
ALIKE = 0.97


def work(ask: Question, way: str) -> Rates:
    """Return the amount of work for each rate if the site is computed this way on one thread."""
    dims, scores = ask.dims, ask.scores
    width = (dims["D"] + dims["Dv"]) / 2
    operand = dims["B"] * (dims["H"] * dims["T"] + dims["G"] * dims["S"]) * (dims["D"] + dims["Dv"])
    copied = operand * (ask.element == 2 if few(ask) else dims["B"] > 1 and dims["T"] > 1)
    repeated, spilled, computed = 0.0, 0.0, float(scores)
    operations = _operations(ask.spec.score)
    if way in COPIES and dims["H"] > dims["G"] and not ask.native:
        repeated = float(dims["B"] * dims["H"] * dims["S"] * (dims["D"] + dims["Dv"]))
        repeated *= 1.0 + COLD * _beyond(SHARED_CACHE, repeated * ask.element)
    elif way == "single":
        again = scores - dims["B"] * dims["G"] * dims["S"]
        repeated = again * 2.0 * width * _beyond(OWN_CACHE, dims["S"] * width * ask.element)
    if way == "inductor":  # scores and weights are alive at the same time
        spilled = scores * _beyond(SHARED_CACHE, 2.0 * scores * ask.element)
    elif way == "flex":
        computed = scores * min(ask.tiles, _visited(ask.spec, tuple(ask.dims.items())))
        if fill_of(ask.spec.score) is not None:  # the mask is evaluated in a few tiles
            operations = _operations(ask.spec.score.args[1])
    elif way != "fused":
        computed = scores * _live(ask.spec, tuple(ask.dims.items()), way == "library")
    if way == "library":
        operations = _mask(ask.spec).added
    elif way == "fused":  # causality counts as a mask like any other
        operations = max(_mask(ask.spec).added, float(_mask(ask.spec).causal))
    functions = computed * sum(_on_scores(e) and e.op in FLOAT_UNARY for e in walk(ask.spec.score))
    draws = computed if ask.spec.random else 0.0
    two_bytes = ask.element == 2
    calls = 2.0 if operations and way in ("library", "chunked") else 1.0
    products = computed * width
    return Rates(
        call=calls, operand=operand * ask.element / 4 if few(ask) else operand, copied=copied, score=computed,
        repeated=repeated, width=0.0 if two_bytes else products, spilled=spilled, program=computed * operations,
        function=functions, draw=draws, narrow=products * two_bytes,
    )  # fmt: skip


def _beyond(cache: int, size: float) -> float:
    """Return the share of `size` bytes that does not stay in a cache."""
    return min(1.0, max(0.0, size / cache - 1.0))


def few(ask: Question) -> bool:
    """Return whether a site is a decode step: reading the keys from memory takes most of its time."""
    return not ask.training and ask.dims["T"] <= FEW


def time(ask: Question, way: str, threads: int) -> float:
    """Predict the ms of a call, or of a training step if a backward pass follows."""
    table = TRAINING if ask.training else DECODING if few(ask) and way in DECODING else FORWARD
    rate, todo = table[way], work(ask, way)
    shared = sum(getattr(todo, name) * getattr(rate, name) for name in vars(rate) if name != "call")
    return (shared / threads + todo.call * rate.call) / 1e6


def candidates(ask: Question, threads: int) -> tuple[Candidate, list[Candidate]]:
    """Return (the original, the possible rewrites) with predicted times (ms) and bytes beyond inputs and output."""
    dims, scores = ask.dims, ask.scores
    again = ask.sums * time(ask, "sums", threads)
    rows = dims["B"] * dims["H"] * 4
    out: list[Candidate] = []
    if ask.can("library"):
        ms = time(ask, "library", threads)
        if ask.training and any(c.grad for c in ask.spec.captures):  # its own backward pass lacks captures' gradients
            forward = replace(ask, training=False)
            ms = time(ask, "chunked", threads) - time(forward, "chunked", threads) + time(forward, "library", threads)
        tile = rows * min(dims["T"], BLOCK) * (dims["S"] if _mask(ask.spec).tiled else 1)
        out.append(Candidate("library", "flash_attention_for_cpu", ms + again, tile))
    if ask.can("chunked"):
        block = min(scores, 1 << 20) * 4 * 3
        out.append(Candidate("chunked", "blocks", time(ask, "chunked", threads) + again, block))
    if ask.can("flex") and not (ask.training and ask.compiled):
        out.append(_flex(ask, threads))
    return _kept(ask, threads, out), out


def _flex(ask: Question, threads: int) -> Candidate:
    """Return the candidate of PyTorch's flex_attention, which only Inductor compiles. As dense operators, it stores the
    scores a few times over: it never is the fastest, and may be the only tier that is allowed."""
    if ask.compiled:
        return Candidate("flex", "cpp", time(ask, "flex", threads), 4 * threads * TILE * (TILE + ask.dims["Dv"]))
    slow = time(ask, "chunked", threads) + time(ask, "inductor", threads)
    return Candidate("flex", "dense", slow, 3 * 4 * ask.scores)


def _kept(ask: Question, threads: int, others: list[Candidate]) -> Candidate:
    fused = time(ask, "fused", threads)
    if ask.native:
        # a decode step of PyTorch's own call, measured at four sizes: 0.7 to 1.5 of the best rewrite's time
        least = min((c.predicted_ms for c in others), default=fused) if few(ask) else fused
        return Candidate("kept", "aten", min(fused, least), 0)
    ms = time(ask, "single" if few(ask) and (ask.single or ask.dims["T"] == 1) else "inductor", threads)
    if few(ask):
        ms = fused if ask.dims["H"] > ask.dims["G"] and _unmasked(ask.spec) else ms
    elif _may_be_known(ask.spec) and all(c.predicted_ms > ALIKE * fused for c in others):
        ms = min(ms, fused)
    return Candidate("kept", "inductor", ms, 2 * ask.scores * ask.element)


@lru_cache(maxsize=1024)
def _may_be_known(spec: AttentionSpec) -> bool:
    """Return whether Inductor matches some spelling of the site: a softmax of scaled products with an optional bias."""
    plain = spec.normaliser == "softmax" and spec.weight is A.PROB and not (spec.random or spec.extra)
    return plain and spec.score.op != "where" and additive(spec.score) is not None


@lru_cache(maxsize=1024)
def _unmasked(spec: AttentionSpec) -> bool:
    """Return whether a site lacks bias and mask: Inductor matches nearly all of its spellings."""
    found = additive(spec.score)
    return _may_be_known(spec) and found is not None and found[1] is ZERO and found[2] is None


@lru_cache(maxsize=1024)
def _operations(score: Expr) -> int:
    """Count the operations on every score beyond one scaled product."""
    return max(0, sum(_on_scores(e) and e.kind != "i" for e in walk(score)) - 1)


@lru_cache(maxsize=4096)
def _on_scores(e: Expr) -> bool:
    """Return whether an operation runs once for every score."""
    return bool(e.args) and ("j" in e.free or any(x.op == "dot" for x in walk(e)))


@dataclass(frozen=True)
class _Mask:
    """A site's mask and bias, as arguments of PyTorch's operator.

    causal  whether the call sets is_causal, once for all queries
    added   operations per score to add the bias: 0 without one, 0.25 for a row that all queries share, 1 for a tile;
            2 for a tile that differs by batch or head
    tiled   whether the bias differs by query, so that each block of queries is a call
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
def _visited(spec: AttentionSpec, items: tuple[tuple[str, int], ...]) -> float:
    """Return the share of the scores in the tiles that flex_attention visits."""
    dims = dict(items)
    return visited(spec, dims, TILE, TILE).scores / max(dims["T"] * dims["S"], 1)


@lru_cache(maxsize=1024)
def _live(spec: AttentionSpec, items: tuple[tuple[str, int], ...], fused: bool) -> float:
    """Return the share of the scores that is computed, with `fused` by PyTorch's operator."""
    dims, mask = dict(items), _mask(spec)
    if fused and not (mask.causal or mask.tiled):
        return 1.0
    found = visited(spec, dims, BLOCK, KEYS if fused and mask.causal else 1).scores
    return found / max(dims["T"] * dims["S"], 1)
