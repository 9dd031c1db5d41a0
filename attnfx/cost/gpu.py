"""Predict the time and memory of every way to compute a site on a GPU.

Times are of kernels whose inputs are in memory. docs/targets.md explains each term and its source.
"""

from __future__ import annotations

import math
from dataclasses import replace

from attnfx.cost.gpu_kernel import Kernel, even, of_code, work
from attnfx.cost.gpu_library import Operators, padded
from attnfx.cost.instruction_counts import Code, codes
from attnfx.cost.operation_counts import operations
from attnfx.cost.query import Question
from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import walk
from attnfx.mask import key_span, mask_of, rows_live
from attnfx.mask import runtime_summary as mask_summary
from attnfx.mask.additive import LOST, addend
from attnfx.mask.predicate import kept
from attnfx.report.records import Candidate
from attnfx.spec import I, J
from attnfx.targets import Target
from attnfx.targets import sdpa_dispatch as fused

SINGLE_SHARE = 0.5  # share of the float32 rate that float32 tiles reach without matrix instructions; an estimate
DECODE_ROWS = 64  # most queries times heads of a group: see kernels/flash/host/decode.py
SINGLE_DECODE_KEYS = 32  # keys of a float32 tile: see kernels/flash/host/tiles.py
PAIR_ELEMENTS = 1 << 24  # in a slice of a gradient by row and key, before its sum: see kernels/flash/host/backward.py
WAVES, MOST_SPLITS = (2, 1, 4), 64  # programs per multiprocessor, the kernel's default first; most splits
# A mask stored in tensors is summarized, so that kernels skip the tiles that it empties, if that takes at most this
# share of the kernels' predicted time. The number of empty tiles is known only at run time. A mask that empties at
# least this share of them (less padding hardly needs a mask) makes the whole faster; any other costs at most the share.
EMPTY = 1 / 8
ACTIVATION_GAIN = 0.9  # share of the decision's time from which on another FlashAttention is worth a note
SUMMARISED = 8  # instructions per score beside its mask: two bound tests, a selection and the reduction of a grain


def candidates(ask: Question, target: Target) -> tuple[Candidate, list[Candidate]]:
    """Return (the original, the possible rewrites) with predicted times (ms) and bytes. If a tier has several
    configurations, the kernels' own default comes first."""
    site = _Site(ask, target)
    out: list[Candidate] = []
    if ask.can("flash"):
        out += site.flash()
    if ask.can("decode") and not ask.training:
        out += site.decode()
    if ask.can("library") and not ask.native:
        out += site.library()
    if ask.can("flex"):
        out += [site.flex(name) for name in (fused.FLASH, fused.FLASH4)[: 1 + ask.flex_flash]]
    if ask.can("chunked"):
        out.append(site.chunked())
    return site.original(), out


def summary(ask: Question, target: Target, tier: str) -> mask_summary.Summary | None:
    """Return the summary of a mask stored in tensors that a tier's candidates use. None if the spec lacks such a mask
    or summarizing it does not pay off."""
    site = _Site(ask, target)
    if tier in ("flash", "decode"):
        site.flash() if tier == "flash" else site.decode()
    return site.made


def activation(ask: Question, target: Target, decision: Candidate) -> str:
    """Return which implementation of FlashAttention, if PyTorch activated it, would be predicted to be the fastest
    candidate by far, as a sentence; empty if none would."""
    if not ask.can("library") or ask.native or ask.backends.flash != "FA2":
        return ""
    found: list[tuple[float, str, str]] = []
    for name, kernel in fused.IMPLEMENTATIONS.items():
        there = replace(ask, backends=replace(ask.backends, flash=name))
        found += [(c.predicted_ms, name, kernel) for c in _Site(there, target).library() if c.kernel == kernel]
    time, name, kernel = min(found, default=(math.inf, "", ""))
    if name == "FA2" or time > ACTIVATION_GAIN * decision.predicted_ms:
        return ""
    return (
        f"{kernel} is predicted to take {time / decision.predicted_ms:.2f} x the time of this decision; it is a "
        f'candidate once `torch.nn.attention.activate_flash_attention_impl("{name}")` was called, or in a target with '
        f'`flash_attention="{name}"`'
    )


class _Site(Operators):
    """One question with the candidates of attnfx's own kernels."""

    # -- flash ----------------------------------------------------------------------------------
    def flash(self) -> list[Candidate]:
        kernels = 3 + sum(c.grad for c in self.ask.spec.captures) if self.ask.training else 1
        if self.ask.dtype == "float32":
            time = self.single(1.0 + (2.5 if self.ask.training else 0.0))
            before, states = self.summarised(time, kernels)
            return [Candidate("flash", "triton", before + time, *self.held(states))]
        back, walked = self.backward() if self.ask.training else (0.0, frozenset())
        known = codes("forward" + self.kind, self.target.capability, self.width)
        # with dropout the kernels have one tile and choose it themselves
        named = not self.ask.spec.random
        if self.kind == " loads":
            most = known[0].scores  # a thread holds one loaded value per score: the default tile shows how many fit
            known += tuple(c for c in codes("forward", self.target.capability, self.width)[1:] if c.scores <= most)
        times = {}
        for code in known:
            kernel = self.kernel(code, 2 * (padded(self.dims["D"]) + padded(self.dims["Dv"])))
            if kernel.resident:
                times[code.tile] = self.tiled(kernel, self.heads) + self.launched() + back
        out = []
        before, states = self.summarised(min(times.values(), default=0.0), kernels)
        held, saved = self.held(states)
        for (rows, keys, warps, stages), time in times.items():
            used = held + self.walks(*walked, ("T", rows, keys))
            found = Candidate("flash", "triton", before + time, used, saved)
            out.append(replace(found, tile=(rows, keys), warps=warps, stages=stages) if named else found)
        return out

    def held(self, states: int) -> tuple[int, int]:
        """Return (bytes beside the operands, bytes of them saved for backward), with a summary of `states` bytes."""
        held, training = 4 * self.rows + states, self.ask.training
        return held + training * self.between(), training * (held + (8 if self.ask.spec.random else 0))

    def walks(self, *of: tuple[str, int, int]) -> int:
        """Return the bytes of the key ranges for kernels with these tiles: four int32 per block, cached and shared.
        With a summary, add the ranges and tile lists of every batch and head that it distinguishes."""
        if not self.masked and self.made is None:
            return 0
        ranges = sum(16 * -(-self.dims[axis] // block) for axis, block, _ in set(of))
        return ranges + sum(self.lists(*tile) for tile in of)

    def lists(self, axis: str, block: int, step: int) -> int:
        """Return the bytes of a summary's ranges and tile lists along an axis, for each batch and head in it."""
        if self.made is None:
            return 0
        blocks, tiles = -(-self.dims[axis] // block), -(-self.dims["S" if axis == "T" else "T"] // step)
        return math.prod(mask_summary.shape(self.made.spec, self.dims)[:2]) * blocks * (16 + 4 * tiles)

    def summarised(self, kernels_time: float, kernels: int, decode: bool = False) -> tuple[float, int]:
        """Return (ms, bytes that stay allocated) of summarizing a mask in tensors for `kernels` kernels, which take
        `kernels_time` without it. Both are zero if the summary does not pay off, or if heads of the decode kernel share
        keys and not a list of tiles. Skipped tiles are not counted: only the run time knows them."""
        found = mask_summary.of(self.ask.spec)
        self.made = None
        if found is None or (decode and "h" in mask_summary.axes(found.spec) and self.dims["G"] != self.dims["H"]):
            return 0.0, 0
        time = self.summary_time(found, kernels)
        if time > EMPTY * kernels_time:
            return 0.0, 0
        self.made = found
        return time, mask_summary.cost(found, self.dims).written

    def summary_time(self, found: mask_summary.Summary, kernels: int) -> float:
        """Return the ms of the summary pass and of building the lists of `kernels` kernels from it. Every site counts
        the whole pass, although layers with the same mask share it."""
        one, ops = mask_summary.cost(found, self.dims), operations(found.spec)
        busy = one.evaluations * (SUMMARISED + ops.always + ops.masked) / self.float_rate
        return max(busy, self.copied(one.read + one.written)) + self.launched(1 + kernels)

    def between(self) -> int:
        """Return the bytes of the flash kernels' backward pass beyond logsumexp, the operands and all gradients. These
        are two statistics per row (three in float32) and the largest gradient of a load before its sum into the
        capture. That gradient is computed in slices of rows if the capture may be smaller."""
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
            elif {"i", "j"} <= e.free:  # depends on j - i only: a line for each half of a tile
                size = 2 * shared * step * (-(-dims["T"] // step) + -(-dims["S"] // step))
            else:
                size = self.heads * dims["S" if "j" in e.free else "T"]
            largest = max(largest, 4 * size)
        return 4 * self.rows * (3 if self.ask.dtype == "float32" else 2) + largest

    def pair_rows(self) -> int:
        """Return the side of the square tiles of a gradient by row and key, as in kernels/flash/host/backward.py."""
        side = min(codes("rows" + self.kind, self.target.capability, self.width)[0].tile[:2])
        return side if self.target.capability >= 90 else min(side, 32)

    def kernel(self, code: Code, products: float) -> Kernel:
        """Return the cost of one of attnfx's kernels; `products` is its matrix FLOPs per score, over all products."""
        extra = self.extra if code.kernel == "decode" else self.beside
        return of_code(code, self.target, self.ask.dtype, products, extra)

    def tiled(self, kernel: Kernel, heads: int, repeat: int = 1, turned: bool = False) -> float:
        """Predict the ms of a launch over blocks of rows, or with `turned` over blocks of keys. A block of keys walks
        the rows of `repeat` heads. Its work is the average: masks empty tiles along the keys as they do along the
        rows."""
        part = work(self.ask.spec, self.sizes, kernel.rows, kernel.keys)
        bytes_per_step = kernel.keys * self.pair
        if turned:
            blocks = -(-self.dims["S"] // kernel.keys)
            part = even(blocks, -(-part.total // blocks), part.full)
            bytes_per_step = kernel.rows * self.pair
        time = kernel.milliseconds(self.target, part, heads, bytes_per_step, repeat)
        return max(time, self.fetched(part, kernel.keys))

    def single(self, share: float) -> float:
        """Predict the ms of `share` float32 forward passes, whose products use plain arithmetic on every chip."""
        part = work(self.ask.spec, self.sizes, 32, 32)
        scores = part.total * 32 * 32 * self.heads
        flops = 2.0 * scores * (padded(self.dims["D"]) + padded(self.dims["Dv"]))
        other_work = scores * (8 + self.extra.always) / self.float_rate
        busy = flops / (SINGLE_SHARE * 2 * self.float_rate) + other_work
        return share * max(busy, self.copied(self.operands)) + self.launched()

    def backward(self) -> tuple[float, frozenset[tuple[str, int, int]]]:
        """Return (ms, tiles for which it needs key or row ranges) of the flash kernels' backward pass."""
        ask, dims = self.ask, self.dims
        width_k, width_v = padded(dims["D"]), padded(dims["Dv"])
        leaves = sum(c.grad for c in ask.spec.captures)
        time = self.copied(2 * self.rows * dims["Dv"] * ask.element) + self.launched()  # sums of out * grad_out
        tiles = set()
        for name, products, turned in (
            ("rows", 4 * width_k + 2 * width_v, False),
            ("keys", 4 * width_k + 4 * width_v, True),
        ):
            code = codes(name + self.kind, self.target.capability, self.width)[0]
            kernel = self.kernel(code, products)
            group = dims["H"] // max(dims["G"], 1) if turned else 1
            once = self.tiled(kernel, self.heads // max(group, 1), group, turned) + self.launched()
            time += once if turned else once * (1 + leaves)  # each capture's gradient is a separate launch
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
        first, end = self.seen()
        length = max(end - first // keys * keys, 1)
        memory = self.copied(self.operands_of(length))
        out: dict[int, Candidate] = {}
        for waves in WAVES[:1] if single else WAVES:
            splits, chunk = splits_of(length, groups, keys, target.multiprocessors, waves)
            part = even(splits, -(-chunk // keys), 0.0 if self.masked or length % keys else 1.0)
            partial = groups * splits * rows * 4 * (padded(dims["Dv"]) + 2)
            busy = 0.0 if single else kernel.milliseconds(target, part, groups, keys * self.pair)
            time = max(busy, memory) + self.passed(2 * partial) + self.launched(2)
            found = Candidate("decode", "triton", time, 4 * self.rows + partial)
            if not single:
                found = replace(found, tile=(rows, keys), warps=warps, stages=stages, splits=splits)
            out.setdefault(splits, found)
        before, states = self.summarised(min(c.predicted_ms for c in out.values()), 1, decode=True)
        more = states + self.lists("T", dims["T"], keys)
        return [
            replace(c, predicted_ms=before + c.predicted_ms, predicted_bytes=more + c.predicted_bytes)
            for c in out.values()
        ]

    def seen(self) -> tuple[int, int]:
        """Return the range of keys that the decode kernel reads. It reads all keys if some row may lack live keys: that
        row's output is computed from its masked keys."""
        spec, dims = self.ask.spec, self.dims
        mask = mask_of(spec.score) if spec.normaliser == "softmax" else None
        finite = mask is not None and mask.fill != -math.inf and not rows_live(spec, dims)
        if not self.masked or finite or addend(spec.score, LOST) is not None:
            return 0, dims["S"]
        return key_span(kept(spec), dims)


def splits_of(keys: int, heads: int, step: int, processors: int, waves: int) -> tuple[int, int]:
    """Return (splits, keys of each split), as in kernels/flash/host/decode.py."""
    tiles = -(-keys // step)
    wanted = max(1, min(MOST_SPLITS, -(-waves * processors // max(heads, 1)), tiles))
    chunk = -(-tiles // wanted) * step
    return -(-keys // chunk), chunk
