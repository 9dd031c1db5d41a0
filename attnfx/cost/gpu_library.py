"""Predict a site's time on a GPU without attnfx's kernels: PyTorch's fused operator, eager blocks, the original."""

from __future__ import annotations

from dataclasses import replace

from attnfx.cost.gpu_kernel import COPY, L2_SHARE, Work, other, other_backward, work
from attnfx.cost.gpu_occupancy import float_lanes, matrix_rate
from attnfx.cost.operation_counts import DROPOUT, operations
from attnfx.cost.query import Question
from attnfx.ir import algebra as A
from attnfx.mask import FLEX_TILE, visited
from attnfx.mask import runtime_summary as mask_summary
from attnfx.mask.predicate import kept
from attnfx.report.records import Candidate
from attnfx.spec import AttentionSpec, I, J, reads_pairs
from attnfx.targets import Target
from attnfx.targets import sdpa_dispatch as fused

# How often scores pass through memory: Inductor writes them, reads and writes them in the softmax, and reads them for
# the second product. Its backward pass writes and reads the gradients of the weights and of the scores, and reads the
# weights twice. Dropout adds a mask that is written and read.
PASSES, BACKWARD_PASSES, DROPOUT_PASSES = 4, 7, 2
LAUNCHES, BACKWARD_LAUNCHES = 3, 6
PRODUCTS = 0.75  # share of the rates that batched products of attention's shapes reach; an estimate
FLEX = 0.75  # share of FlashAttention-2's rate that flex_attention reaches; an estimate
EAGER_PASSES = 6  # over float32 scores in a block of eager operators, besides one per operation of the score program
BLOCK = 1 << 26  # scores of a block, as in kernels/chunked/blocks.py
BLOCK_ROWS = 128
SEEDS = 16  # bytes of a seed and its offset, which PyTorch's fused operator saves even without dropout


def padded(width: int) -> int:
    """Pad a head dim to the kernels' tile width: the next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


class Operators:
    """One question, the quantities that all its candidates need, and the candidates of PyTorch's own operators."""

    def __init__(self, ask: Question, target: Target) -> None:
        self.ask, self.target, self.dims = ask, target, ask.dims
        self.heads = self.dims["B"] * self.dims["H"]
        self.rows = self.heads * self.dims["T"]
        self.width = max(padded(self.dims["D"]), padded(self.dims["Dv"]))
        self.pair = (self.dims["D"] + self.dims["Dv"]) * ask.element  # bytes of a key and its value
        # float32 operations in a ms, a multiply-add as one
        self.float_rate = float_lanes(target) * (target.multiprocessors * target.clock * 1e6)
        self.sizes = tuple(sorted((k, v) for k, v in self.dims.items() if k not in ("G", "D", "Dv")))
        self.extra = self.beside = operations(ask.spec)
        # these kernels have separate tiles, and the instructions of a dropout kernel include the random numbers
        self.kind = " dropout" if ask.spec.random else " loads" if reads_pairs(ask.spec) else ""
        if ask.spec.random:
            self.beside = replace(self.extra, always=self.extra.always - DROPOUT)
        self.masked = kept(ask.spec) is not A.TRUE
        self.made: mask_summary.Summary | None = None  # of the tier computed last

    # -- memory ---------------------------------------------------------------------------------
    @property
    def operands(self) -> int:
        """Return the bytes of query, key, value and output."""
        return self.operands_of(self.dims["S"])

    def operands_of(self, keys: int) -> int:
        """Return the bytes of query, key, value and output with this many keys."""
        return (self.rows + self.dims["B"] * self.dims["G"] * keys) * self.pair

    def copied(self, count: float) -> float:
        """Return the ms to move `count` bytes through memory."""
        return count / (COPY * self.target.bandwidth * 1e6)

    def passed(self, count: float) -> float:
        """Return the ms to move bytes just written by another kernel: they are in the last shared cache if they fit."""
        memory, cache = self.copied(count), count / (L2_SHARE * self.target.l2_bandwidth * 1e6)
        return min(memory, cache) if count <= self.target.l2 / 2 else memory

    def launched(self, count: float = 1.0) -> float:
        return count * self.target.launch / 1e3

    def fetched(self, part: Work, keys: int) -> float:
        """Return the ms of memory traffic of a tiled pass: the operands once, and possibly keys again. Keys are read
        again if the heads that run at the same time do not fit into the last shared cache."""
        target, running = self.target, min(self.heads, -(-self.target.multiprocessors // max(part.blocks, 1)))
        held = running * self.dims["S"] * self.pair
        again = 0.0 if held <= target.l2 else part.total * self.heads * keys * self.pair
        return self.copied(self.operands + again * max(0.0, 1 - target.l2 / max(held, 1)))

    # -- candidates ----------------------------------------------------------------------------
    def chunked(self) -> Candidate:
        """Return the candidate of eager operators on blocks and their live keys. Every operation moves float32 scores
        through memory."""
        ask, dims = self.ask, self.dims
        live = visited(ask.spec, dict(self.sizes), BLOCK_ROWS, 1).scores * self.heads
        passes = 2 * (EAGER_PASSES + self.extra.always + self.extra.masked)
        blocks = max(1, -(-live // BLOCK))
        time = self.products(live) + self.copied(4 * live * passes) + blocks * self.launched(passes)
        if ask.training:
            time += 2.5 * self.products(live) + 2 * self.copied(4 * live * passes) + 2 * blocks * self.launched(passes)
        block = min(dims["B"] * dims["H"] * dims["T"] * dims["S"], BLOCK)
        return Candidate("chunked", "blocks", time, 3 * 4 * block, 4 * self.rows if ask.training else 0)

    def flex(self, name: str = fused.FLASH) -> Candidate:
        """Return the candidate of PyTorch's flex_attention, which Inductor compiles in Triton or runs on
        FlashAttention-4. It reaches FLEX of the rate of FlashAttention-2, or 4, on the tiles of its block mask, beside
        its score program; an estimate."""
        ask, dims = self.ask, self.dims
        if not ask.compiled:  # as dense operators, which are never the fastest
            slow = self.chunked().predicted_ms + self.original().predicted_ms
            return Candidate("flex", "dense", slow, 3 * 4 * ask.scores)
        part = work(ask.spec, self.sizes, FLEX_TILE, FLEX_TILE)
        scores = part.total * FLEX_TILE**2 * self.heads
        if ask.dtype == "float32":  # exact products, without tensor cores, at half of the plain rate
            busy = 2 * scores * (padded(dims["D"]) + padded(dims["Dv"])) / self.float_rate
        else:
            one = other(name, self.target, ask.dtype, fused.rounded(max(dims["D"], dims["Dv"])))
            tiles = work(ask.spec, self.sizes, one.rows, one.keys)
            busy = one.milliseconds(self.target, tiles, self.heads, one.keys * self.pair)
        busy = busy / FLEX + scores * self.extra.always / self.float_rate
        time = max(busy, self.fetched(part, FLEX_TILE)) + self.launched()
        held = 8 * self.rows  # the log-sum-exp and the largest score
        if ask.training:
            time += max(3 * busy, 2 * self.copied(self.operands)) + self.launched(2)
        kernel = "triton" if name == fused.FLASH else name
        return Candidate("flex", kernel, time, held, held if ask.training else 0)

    def products(self, scores: float) -> float:
        """Return the ms of the two products of dense scores."""
        dims, target = self.dims, self.target
        flops = 2.0 * scores * (dims["D"] + dims["Dv"])
        dtype = self.ask.dtype
        rate = PRODUCTS * matrix_rate(target, dtype) * target.multiprocessors * target.clock * 1e6
        return max(flops / rate, self.copied(self.operands) / PRODUCTS)

    def original(self) -> Candidate:
        """Return the original: the graph under Inductor, or PyTorch's fused operator if the graph calls it."""
        ask = self.ask
        if ask.native and (name := self.selected()) is not None:
            return replace(self.fused(name), tier="kept", kernel="aten")
        size = ask.scores * ask.element
        drop = DROPOUT_PASSES if ask.spec.random else 0
        passes, launches = PASSES + drop, LAUNCHES
        time = self.products(ask.scores)
        if ask.training:
            passes, launches = passes + BACKWARD_PASSES + drop, launches + BACKWARD_LAUNCHES
            time += 2 * self.products(ask.scores)
        time += passes * self.passed(size) + self.launched(launches)
        saved = size * (1 + bool(drop)) if ask.training else 0
        return Candidate("kept", "inductor", time, 2 * size, saved)

    @property
    def shape(self) -> fused.Shape:
        """Return the shape of a call of PyTorch's fused operator. It does not skip tiles by masks that are tensors."""
        dims, keep = self.dims, kept(self.ask.spec)
        causal = dims["T"] == dims["S"] and keep is A.ge(I, J)
        plain = not self.ask.spec.captures and (keep is A.TRUE or causal)
        return fused.Shape(self.ask.dtype, self.target.capability, dims["D"], dims["Dv"], dims["H"] != dims["G"], plain)

    def selected(self) -> str | None:
        """Return the kernel of a graph's own call of PyTorch's fused operator, or None if PyTorch stores the scores. If
        none of the known kernels takes it, another one is assumed to be as fast as FlashAttention-2."""
        if self.target.kind != "cuda":
            return None
        half = self.ask.dtype in fused.DTYPES and self.target.capability >= fused.LEAST_CAPABILITY
        return fused.kernel(self.shape, self.ask.backends) or (fused.FLASH if half else None)

    def library(self) -> list[Candidate]:
        """Return the candidates of PyTorch's fused operator, PyTorch's own selection first."""
        names = () if self.target.kind != "cuda" else fused.offered(self.shape, self.ask.backends, self.ask.training)
        return [] if isinstance(names, str) else [self.fused(name) for name in names]

    def fused(self, name: str) -> Candidate:
        """Return the candidate of one kernel of PyTorch's fused operator."""
        ask, dims, target = self.ask, self.dims, self.target
        width = fused.rounded(max(dims["D"], dims["Dv"]))
        one = other(name, target, ask.dtype, width)
        spec = AttentionSpec() if ask.spec.captures else ask.spec
        part = work(spec, self.sizes, one.rows, one.keys)
        time = max(one.milliseconds(target, part, self.heads, one.keys * self.pair), self.fetched(part, one.keys))
        if not ask.training:
            return Candidate("library", name, time + self.launched(), 4 * self.rows)
        time += other_backward(name, target, ask.dtype, width, time, self.rows * dims["Dv"], ask.element)
        saved = 4 * self.heads * fused.logsumexp(name, dims["T"]) + SEEDS
        query, key = (tuple(dims[n] for n in names) for names in (("B", "H", "T"), ("B", "G", "S", "D")))
        held = saved + fused.workspace(query, key, dims["Dv"], ask.element)
        return Candidate("library", name, time + self.launched(), held, saved)
