"""Predict the time of a site on a CPU: for each way to compute it, the sum of its work items times their rates.

The rates are fitted to benchmarks/results/grid.json by `python benchmarks/grid.py --fit`, which prints this file's
tables (AMD EPYC with 32 MiB of shared cache, one thread's own time). Other processors have other rates, but the ratios
that decide differ less. `attnfx bench --calibrate` corrects them.
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
    operand  per element of query, key, value and output: the first pass through memory
    copied   per such element if the batch is larger than one: in a model's layout, batch and heads do not merge into
             one axis, so batched products and Inductor's fused calls copy; not for a single query, which is not batched
    score    per computed score, at any head width
    width    per score and unit of head width: the two contractions
    repeated per element of keys and values that the original copies for each query head of a group, if the copies fit
             into the shared cache; on an Intel Xeon, 11 decode steps: 0.38 to 0.5, and 2.2 to 2.7 if they do not fit
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
    # 44 points, mean error 9%
    "inductor": Rates(
        operand=0.129, copied=0.239, score=1.73, width=0.0408, repeated=0.45, spilled=1.75, program=0.296,
        function=2.08, narrow=0.0231,
    ),
    # 30 points, mean error 6%
    "fused": Rates(
        call=20900, operand=0.48, copied=0.7, score=0.483, width=0.0414, repeated=0.45, program=1.74, narrow=0.0487,
    ),
    # 71 points, mean error 8%
    "library": Rates(call=224000, operand=0.576, copied=0.0904, score=0.735, width=0.0424, program=1.24, narrow=0.0483),
    # 74 points, mean error 14%
    "chunked": Rates(call=123000, operand=0.818, score=1.7, width=0.0576, program=0.743, function=1.87, narrow=0.0696),
    # 22 points of grid_flex.json in proportion to the fastest other contender, mean error 11%
    "flex": Rates(operand=0.958, copied=1.19, width=0.143, function=4.57, narrow=0.0774),
    # one size, 12 heads x 2048 x 64: the grid does not contain sums of the weights
    "sums": Rates(call=400000, score=2.5, width=0.02),
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
SHARED_CACHE = 32 << 20  # bytes
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
    copied = operand if dims["B"] > 1 and dims["T"] > 1 else 0.0
    repeated, spilled, computed = 0.0, 0.0, float(scores)
    operations = _operations(ask.spec.score)
    if way in ("inductor", "fused") and dims["H"] > dims["G"] and not ask.native:
        repeated = float(dims["B"] * dims["H"] * dims["S"] * (dims["D"] + dims["Dv"]))
        repeated *= 1.0 + COLD * _beyond_cache(repeated * ask.element)
    if way == "inductor":  # scores and weights are alive at the same time
        spilled = scores * _beyond_cache(2.0 * scores * ask.element)
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
    return Rates(
        call=calls, operand=operand, copied=copied, score=computed, repeated=repeated,
        width=0.0 if two_bytes else computed * width, spilled=spilled, program=computed * operations,
        function=functions, draw=draws, narrow=computed * width * two_bytes,
    )  # fmt: skip


def _beyond_cache(size: float) -> float:
    """Return the share of `size` bytes that does not stay in the shared cache."""
    return min(1.0, max(0.0, size / SHARED_CACHE - 1.0))


def time(ask: Question, way: str, threads: int) -> float:
    """Predict the ms of a call, or of a training step if a backward pass follows."""
    rate, todo = (TRAINING if ask.training else FORWARD)[way], work(ask, way)
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
        return Candidate("kept", "aten", fused, 0)
    ms = time(ask, "inductor", threads)
    if _may_be_known(ask.spec) and all(c.predicted_ms > ALIKE * fused for c in others):
        ms = min(ms, fused)
    return Candidate("kept", "inductor", ms, 2 * ask.scores * ask.element)


@lru_cache(maxsize=1024)
def _may_be_known(spec: AttentionSpec) -> bool:
    """Return whether Inductor matches some spelling of the site: a softmax of scaled products with an optional bias."""
    plain = spec.normaliser == "softmax" and spec.weight is A.PROB and not (spec.random or spec.extra)
    return plain and spec.score.op != "where" and additive(spec.score) is not None


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
