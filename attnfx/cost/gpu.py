"""What a GPU takes for a site: every way to compute it, with its predicted time and bytes.

Times are of kernels whose inputs lie in memory; docs/targets.md says what each term means and where it is from.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from attnfx.cost.instructions import Code, codes
from attnfx.cost.kernels import COPY, L2_SHARE, Kernel, Work, even, of_code, other, work
from attnfx.cost.program import Operations, operations
from attnfx.cost.question import Question
from attnfx.cost.throughput import float_lanes, matrix_rate
from attnfx.ir import algebra as A
from attnfx.ir.expr import substitute, walk
from attnfx.mask import summary as mask_summary
from attnfx.mask import visited
from attnfx.mask.keep import kept
from attnfx.report import Candidate
from attnfx.spec import AttentionSpec, I, J
from attnfx.targets import Target

# How often the scores pass through memory: Inductor writes them, reads and writes them in the softmax, and reads them
# for the second product. Its backward pass: the gradient of the weights and of the scores, written and read, and the
# weights read twice. Dropout adds a mask that is written and read.
PASSES, BACKWARD_PASSES, DROPOUT_PASSES = 4, 7, 2
LAUNCHES, BACKWARD_LAUNCHES = 3, 6
PRODUCTS = 0.75  # share of the rates that batched products of attention's shapes hold; an estimate
EAGER_PASSES = 6  # of float32 scores in a block of eager operators, beyond one for each operation of the program
BLOCK = 1 << 26  # scores of a block, as kernels/chunked.py cuts them
BLOCK_ROWS = 128
SINGLE_SHARE = 0.5  # of the float32 rate that products of float32 tiles hold without matrix instructions; an estimate
DECODE_ROWS = 64  # queries times heads of a group, as kernels/flash/split.py takes them
SINGLE_DECODE_KEYS = 32  # of a float32 tile, as kernels/flash/tiles.py has it
PAIR_ELEMENTS = 1 << 24  # of a gradient by row and key before it is added up, as kernels/flash/gradients.py slices it
SUMMARISED = 8  # instructions of a score beside its mask: two tests of bounds, a selection and the reduction of a grain
WAVES, MOST_SPLITS = (2, 1, 4), 64  # programs for each multiprocessor; the first is the kernel's own


def candidates(ask: Question, target: Target) -> tuple[Candidate, list[Candidate]]:
    """(the original, the rewrites that can run) with their predicted times (ms) and bytes; of a tier with several
    configurations, the kernels' own default comes first."""
    site = _Site(ask, target)
    out: list[Candidate] = []
    if ask.can("flash"):
        out += site.flash()
    if ask.can("decode") and not ask.training:
        out += site.decode()
    if ask.can("chunked"):
        out.append(site.chunked())
    return site.original(), out


def padded(width: int) -> int:
    """The width of a tile that holds a head dim, as the kernels pad it: the next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


class _Site:
    """One question with what all of its candidates need."""

    def __init__(self, ask: Question, target: Target) -> None:
        self.ask, self.target, self.dims = ask, target, ask.dims
        self.heads = self.dims["B"] * self.dims["H"]
        self.rows = self.heads * self.dims["T"]
        self.width = max(padded(self.dims["D"]), padded(self.dims["Dv"]))
        self.sizes = tuple(sorted((k, v) for k, v in self.dims.items() if k not in ("G", "D", "Dv")))
        self.extra = operations(ask.spec)
        self.masked = kept(ask.spec) is not A.TRUE
        self.summary = mask_summary.worth(ask.spec, self.dims, passes=3 if ask.training else 1)

    # -- memory ---------------------------------------------------------------------------------
    @property
    def operands(self) -> int:
        """Bytes of query, key, value and output."""
        dims = self.dims
        both = dims["D"] + dims["Dv"]
        return (self.rows + dims["B"] * dims["G"] * dims["S"]) * both * self.ask.element

    def copied(self, count: float) -> float:
        """Milliseconds of bytes through memory."""
        return count / (COPY * self.target.bandwidth * 1e6)

    def passed(self, count: float) -> float:
        """The same, of a value that another kernel has just written: what fits stays in the last shared cache."""
        memory, cache = self.copied(count), count / (L2_SHARE * self.target.l2_bandwidth * 1e6)
        return min(memory, cache) if count <= self.target.l2 / 2 else memory

    def launched(self, count: float = 1.0) -> float:
        return count * self.target.launch / 1e3

    def fetched(self, part: Work, keys: int) -> float:
        """Milliseconds that memory needs for a tiled pass: operands once, and keys again where the heads that run at
        the same time do not fit into the last shared cache."""
        dims, target = self.dims, self.target
        tile = keys * (dims["D"] + dims["Dv"]) * self.ask.element
        of_head = dims["S"] * (dims["D"] + dims["Dv"]) * self.ask.element
        running = min(self.heads, -(-target.multiprocessors // max(part.blocks, 1)))
        again = 0.0 if running * of_head <= target.l2 else part.total * self.heads * tile
        return self.copied(self.operands + again * max(0.0, 1 - target.l2 / max(running * of_head, 1)))

    # -- flash ----------------------------------------------------------------------------------
    def flash(self) -> list[Candidate]:
        before, states = self.summarised()
        held = 4 * self.rows + states
        saved = held + (8 if self.ask.spec.random else 0) if self.ask.training else 0
        held += self.between() if self.ask.training else 0
        if self.ask.dtype == "float32":
            time = before + self.single(1.0 + (2.5 if self.ask.training else 0.0))
            return [Candidate("flash", "triton", time, held, saved)]
        back, walked = self.backward() if self.ask.training else (0.0, frozenset())
        out = []
        known = codes("forward", self.target.capability, self.width)
        # a draw takes registers that the table does not count: the kernels choose their tile then
        named = not self.ask.spec.random
        for code in known if named else known[:1]:
            kernel = self.kernel(code, 2 * (padded(self.dims["D"]) + padded(self.dims["Dv"])))
            rows, keys, warps, stages = code.tile
            if not kernel.resident:
                continue
            time = before + self.tiled(kernel, self.heads) + self.launched()
            used = held + self.walks(walked | {("T", rows, keys)})
            found = Candidate("flash", "triton", time + back, used, saved)
            out.append(replace(found, tile=(rows, keys), warps=warps, stages=stages) if named else found)
        return out

    def walks(self, of: frozenset[tuple[str, int, int]]) -> int:
        """Bytes of the key ranges that kernels with these tiles are given, four int32 for each block; they are kept.
        With a summary also the ranges of every batch and head that it tells apart, and their lists of tiles."""
        if not self.masked:
            return 0
        lists = math.prod(mask_summary.shape(self.summary.spec, self.dims)[:2]) if self.summary is not None else 0
        found = 0
        for axis, block, step in of:
            blocks, tiles = -(-self.dims[axis] // block), -(-self.dims["S" if axis == "T" else "T"] // step)
            found += 16 * blocks + lists * blocks * (16 + 4 * tiles)
        return found

    def summarised(self) -> tuple[float, int]:
        """(ms, bytes that stay) of the pass over a mask that stands in tensors, and of making each kernel's lists from
        it; zeros where there is none. It is whole for every site, though layers that have one mask share it. What the
        kernels then skip is not counted: that is known at run time alone."""
        if self.summary is None:
            return 0.0, 0
        target, cost = self.target, mask_summary.cost(self.summary, self.dims)
        each = SUMMARISED + operations(self.summary.spec).masked
        clocks = target.multiprocessors * target.clock * 1e6
        time = max(cost.evaluations * each / (float_lanes(target) * clocks), self.copied(cost.read + cost.written))
        kernels = 3 + sum(c.grad for c in self.ask.spec.captures) if self.ask.training else 1
        return time + self.launched(1 + kernels), cost.written

    def between(self) -> int:
        """Bytes of the flash kernels' backward pass beyond logsumexp, the operands and all gradients: two statistics of
        each row (three in float32), and the largest gradient of a load before it is added up in its capture, which
        takes slices of rows where the capture may be smaller."""
        dims, spec = self.dims, self.ask.spec
        loads = {e for root in spec.programs for e in walk(root) if e.op == "load"}
        step, largest = self.pair_rows(), 0
        for e in loads:
            if not (isinstance(e.value, int) and spec.captures[e.value].grad):
                continue
            shared = (dims["B"] if "b" in e.free else 1) * (dims["H"] if "h" in e.free else 1)
            moved = substitute(e, {I: A.add(I, A.ONE), J: A.add(J, A.ONE)})
            if {"i", "j"} <= e.free and moved is not e:
                rows = dims["T"]
                if any(x.op != "var" for x in e.args):
                    rows = min(rows, -(-max(1, PAIR_ELEMENTS // (shared * dims["S"])) // step) * step)
                size = shared * rows * dims["S"]
            elif {"i", "j"} <= e.free:  # by j - i alone: a line for each half of a tile
                size = 2 * shared * step * (-(-dims["T"] // step) + -(-dims["S"] // step))
            else:
                size = self.heads * dims["S" if "j" in e.free else "T"]
            largest = max(largest, 4 * size)
        return 4 * self.rows * (3 if self.ask.dtype == "float32" else 2) + largest

    def pair_rows(self) -> int:
        """The side of the square tiles of such a gradient, as kernels/flash/gradients.py takes them."""
        side = min(codes("rows", self.target.capability, self.width)[0].tile[:2])
        return side if self.target.capability >= 90 else min(side, 32)

    def kernel(self, code: Code, products: float) -> Kernel:
        """`products`: matrix FLOPs of each score, over all of the kernel's products."""
        return _kernel(code, self.target, self.ask.dtype, products, self.extra)

    def tiled(self, kernel: Kernel, heads: int, repeat: int = 1, turned: bool = False) -> float:
        """Milliseconds of a launch over blocks of rows; `turned`, over blocks of keys: each walks along the rows of
        `repeat` heads. The work is then shared out evenly: masks leave the keys' ends empty as they do the rows'."""
        part = work(self.ask.spec, self.sizes, kernel.rows, kernel.keys)
        bytes_per_step = kernel.keys * (self.dims["D"] + self.dims["Dv"]) * self.ask.element
        if turned:
            blocks = -(-self.dims["S"] // kernel.keys)
            part = even(blocks, -(-part.total // blocks), part.full)
            bytes_per_step = kernel.rows * (self.dims["D"] + self.dims["Dv"]) * self.ask.element
        time = kernel.milliseconds(self.target, part, heads, bytes_per_step, repeat)
        return max(time, self.fetched(part, kernel.keys))

    def single(self, share: float) -> float:
        """float32: products by plain arithmetic, whatever the chip."""
        part = work(self.ask.spec, self.sizes, 32, 32)
        scores = part.total * 32 * 32 * self.heads
        flops = 2.0 * scores * (padded(self.dims["D"]) + padded(self.dims["Dv"]))
        clocks = self.target.multiprocessors * self.target.clock * 1e6
        rate = SINGLE_SHARE * 2 * float_lanes(self.target) * clocks
        other_work = scores * (8 + self.extra.always) / (float_lanes(self.target) * clocks)
        return share * max(flops / rate + other_work, self.copied(self.operands)) + self.launched()

    def backward(self) -> tuple[float, frozenset[tuple[str, int, int]]]:
        """(ms, tiles whose key or row ranges it is given) of the flash kernels' backward pass."""
        ask, dims = self.ask, self.dims
        width_k, width_v = padded(dims["D"]), padded(dims["Dv"])
        leaves = sum(c.grad for c in ask.spec.captures)
        time = self.copied(2 * self.rows * dims["Dv"] * ask.element) + self.launched()  # sums of out * grad_out
        tiles = set()
        for name, products, turned in (
            ("rows", 4 * width_k + 2 * width_v, False),
            ("keys", 4 * width_k + 4 * width_v, True),
        ):
            code = codes(name, self.target.capability, self.width)[0]
            kernel = self.kernel(code, products)
            group = dims["H"] // max(dims["G"], 1) if turned else 1
            once = self.tiled(kernel, self.heads // max(group, 1), group, turned) + self.launched()
            time += once if turned else once * (1 + leaves)  # each capture's gradient is a pass of its own
            tiles.add(("S", *code.tile[1::-1]) if turned else ("T", *code.tile[:2]))
        return time, frozenset(tiles)

    # -- decode ---------------------------------------------------------------------------------
    def decode(self) -> list[Candidate]:
        dims, target = self.dims, self.target
        packed = dims["T"] * (dims["H"] // max(dims["G"], 1))
        if packed > DECODE_ROWS:
            return []
        rows, groups = max(16, 1 << (packed - 1).bit_length()), dims["B"] * dims["G"]
        single = self.ask.dtype == "float32"
        code = codes("decode", target.capability, self.width)[0]
        _, keys, warps, stages = code.tile
        if single:
            keys = SINGLE_DECODE_KEYS if self.width <= 128 else SINGLE_DECODE_KEYS // 2
        kernel = self.kernel(code, 2 * rows / 16 * (padded(dims["D"]) + padded(dims["Dv"])))
        out: dict[int, Candidate] = {}
        for waves in WAVES[:1] if single else WAVES:
            splits, chunk = splits_of(dims["S"], groups, keys, target.multiprocessors, waves)
            part = even(splits, -(-chunk // keys), 0.0 if self.masked or dims["S"] % keys else 1.0)
            step = keys * (dims["D"] + dims["Dv"]) * self.ask.element
            partial = groups * splits * rows * 4 * (padded(dims["Dv"]) + 2)
            busy = 0.0 if single else kernel.milliseconds(target, part, groups, step)
            time = max(busy, self.copied(self.operands)) + self.passed(2 * partial) + self.launched(2)
            found = Candidate("decode", "triton", time, 4 * self.rows + partial)
            if not single:
                found = replace(found, tile=(rows, keys), warps=warps, stages=stages, splits=splits)
            out.setdefault(splits, found)
        return list(out.values())

    # -- without kernels of ours ----------------------------------------------------------------
    def chunked(self) -> Candidate:
        """Blocks of eager operators on their live keys: float32 scores pass through memory for every operation."""
        ask, dims = self.ask, self.dims
        live = visited(ask.spec, dict(self.sizes), BLOCK_ROWS, 1).scores * self.heads
        passes = 2 * (EAGER_PASSES + self.extra.always + self.extra.masked)
        blocks = max(1, -(-live // BLOCK))
        time = self.products(live) + self.copied(4 * live * passes) + blocks * self.launched(passes)
        if ask.training:
            time += 2.5 * self.products(live) + 2 * self.copied(4 * live * passes) + 2 * blocks * self.launched(passes)
        block = min(dims["B"] * dims["H"] * dims["T"] * dims["S"], BLOCK)
        return Candidate("chunked", "blocks", time, 3 * 4 * block, 4 * self.rows if ask.training else 0)

    def products(self, scores: float) -> float:
        """Milliseconds of the two products of dense scores."""
        dims, target = self.dims, self.target
        flops = 2.0 * scores * (dims["D"] + dims["Dv"])
        dtype = self.ask.dtype
        rate = PRODUCTS * matrix_rate(target, dtype) * target.multiprocessors * target.clock * 1e6
        return max(flops / rate, self.copied(self.operands) / PRODUCTS)

    def original(self) -> Candidate:
        """What stays where nothing is rewritten: the graph under Inductor, or PyTorch's own operator that it calls."""
        ask = self.ask
        if ask.native and ask.dtype != "float32" and self.target.capability >= 80 and self.target.kind == "cuda":
            return self.fused()
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

    def fused(self) -> Candidate:
        """PyTorch's fused operator: cuDNN's kernel where it has one for the chip, else FlashAttention-2. Masks that are
        tensors are not skipped."""
        ask = self.ask
        name = "cudnn" if self.target.capability in (90, 100) else "flash-attention-2"
        kernel = other(name, self.target, ask.dtype, self.width)
        spec = AttentionSpec() if ask.spec.captures else ask.spec
        part = work(spec, self.sizes, kernel.rows, kernel.keys)
        step = kernel.keys * (self.dims["D"] + self.dims["Dv"]) * ask.element
        time = max(kernel.milliseconds(self.target, part, self.heads, step), self.fetched(part, kernel.keys))
        logsumexp = 4 * self.rows
        if ask.training:
            time *= 3.5  # five products instead of two, and their exponentials again
        return Candidate("kept", "aten", time + self.launched(), logsumexp, logsumexp if ask.training else 0)


@lru_cache(maxsize=4096)
def _kernel(code: Code, target: Target, dtype: str, products: float, extra: Operations) -> Kernel:
    return of_code(code, target, dtype, products, extra)


def splits_of(keys: int, heads: int, step: int, processors: int, waves: int) -> tuple[int, int]:
    """(splits, keys of each), as kernels/flash/split.py cuts them."""
    tiles = -(-keys // step)
    wanted = max(1, min(MOST_SPLITS, -(-waves * processors // max(heads, 1)), tiles))
    chunk = -(-tiles // wanted) * step
    return -(-keys // chunk), chunk


__all__ = ["candidates", "padded", "splits_of"]
