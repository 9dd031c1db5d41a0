"""Runs any spec in blocks of queries, on any device: the reference tier, and the one that nothing is too odd for.

A block is a range of queries on the key range that its mask leaves alive, for as many heads as keep the tile of scores
in the cache. Nothing of size T x S exists; out and logsumexp are what the backward pass is given, and it computes each
block's weights again.

Rows without a live key. Keys outside a block's live range are left out, which is exact where every row has a live
key. A row that has none shows it by its logsumexp, which is no larger than half the fill; blocks with such a row are
computed over all keys (`Plan.widen`), by the forward pass and the backward pass alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir.derive import gradient
from attnfx.ir.expr import Expr, rebuild, walk
from attnfx.kernels.call import Call, output_like
from attnfx.kernels.evaluate import Evaluator, block_axes
from attnfx.mask import KeyRange, key_ranges, mask_of, rows_live
from attnfx.spec import AttentionSpec, fill_of

# Elements of one tile of scores, and the least rows of a block. Measured by benchmarks on 2 cores of an AMD EPYC with
# 1 MiB of L2 each and 32 MiB of L3 (8 heads x 4096 x 64, float32). On a GPU each operator is a launch: larger.
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
ROWS = {"cpu": 128, "cuda": 512}
LEAST_ROWS = 16  # of a part of a block

_ZERO = A.const(0.0)


@dataclass(frozen=True)
class Program:
    """A spec made ready: what each block evaluates. In `score` and its slopes, `dot` is scale * (q . k).

    kept         the score where the mask keeps (the score itself where there is no mask)
    keep         the mask of the score's outermost `where`, or None
    fill         what a row without a live key is made of, or None where nothing masks
    slopes       (leaf, d score / d leaf): dot first, then the loads that need a gradient
    kept_slopes  the same of `kept`
    tame         all kept slopes are numbers: in a block whose rows are all live they need no mask, as a dead key's
                 weight is zero
    weights      (leaf, d weight / d leaf): prob first
    extras       for each extra logit, (load, d logit / d load)
    """

    scale: float
    score: Expr
    kept: Expr
    keep: Expr | None
    fill: float | None
    slopes: tuple[tuple[Expr, Expr], ...]
    kept_slopes: tuple[tuple[Expr, Expr], ...]
    tame: bool
    weights: tuple[tuple[Expr, Expr], ...]
    extras: tuple[tuple[tuple[Expr, Expr], ...], ...]


def _scale(score: Expr) -> float:
    """The constant that every occurrence of dot is multiplied by: it goes into the queries instead."""
    scales: set[float] = set()
    for e in walk(score):
        if A.DOT in e.args:
            head, once = e.args[0], e.args.count(A.DOT) == 1  # not so in a power of dot
            scales.add(float(head.value) if e.op == "mul" and head.op == "const" and once else 1.0)  # type: ignore[arg-type]
    scale = scales.pop() if len(scales) == 1 else 1.0
    return scale if math.isfinite(scale) and scale != 0.0 else 1.0


def _unscaled(score: Expr, scale: float) -> Expr:
    if scale == 1.0:
        return score

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if A.DOT in old.args:  # every such node is a product that starts with the scale
            rest = old.args[1:]
            return rest[0] if len(rest) == 1 else A.mul(*rest)
        return None

    return rebuild(score, change)


def _slopes(root: Expr, leaf: Expr | None, wanted: list[Expr]) -> tuple[tuple[Expr, Expr], ...]:
    leaves = [*([leaf] if leaf is not None else []), *(x for x in wanted if x in set(walk(root)))]
    found = zip(leaves, gradient(root, leaves))
    return tuple((x, slope) for x, slope in found if x is leaf or slope is not _ZERO)


def _has_gradient(spec: AttentionSpec, load: Expr) -> bool:
    return spec.captures[load.value].grad  # type: ignore[call-overload]


@lru_cache(maxsize=512)
def program_of(spec: AttentionSpec) -> Program:
    wanted: dict[Expr, None] = {}
    for root in spec.programs:
        for e in walk(root):
            if e.op == "load" and _has_gradient(spec, e):
                wanted[e] = None
            if e.op in ("rsum", "rmax") and any(x.op == "load" and _has_gradient(spec, x) for x in walk(e)):
                raise ValueError(f"a reduction over a capture that needs a gradient has no derivative here: {e}")
    scale = _scale(spec.score)
    score = _unscaled(spec.score, scale)
    masked = fill_of(score) is not None and spec.normaliser == "softmax"
    keep, kept = (score.args[0], score.args[1]) if masked else (None, score)
    found = mask_of(spec.score)
    kept_slopes = _slopes(kept, A.DOT, list(wanted))
    return Program(
        scale=scale,
        score=score,
        kept=kept,
        keep=keep,
        fill=float(found.fill) if found is not None else fill_of(spec.score),
        slopes=_slopes(score, A.DOT, list(wanted)),
        kept_slopes=kept_slopes,
        tame=all(slope.op == "const" for _, slope in kept_slopes),
        weights=_slopes(spec.weight, A.PROB, list(wanted)),
        extras=tuple(_slopes(e, None, list(wanted)) for e in spec.extra),
    )


class Block(NamedTuple):
    """Batches [b0, b1), key heads [g0, g1), queries [i0, i1), keys [j0, j1).

    number  seeds its dropout
    full    every key of it is live
    live    every row of it is known to have a live key
    whole   the block that it is a part of, whose dropout is drawn at once; None where it is no part
    """

    number: int
    b0: int
    b1: int
    g0: int
    g1: int
    i0: int
    i1: int
    j0: int
    j1: int
    full: bool
    live: bool
    whole: Block | None = None


class Plan:
    """How a call is cut into blocks. Both passes make the same one.

    Where fewer `elements` than a tile's are allowed, each block is computed in parts. The blocks stay as they are, and
    so does their dropout.
    """

    def __init__(
        self, spec: AttentionSpec, sizes: dict[str, int], groups: int, device: torch.device, elements: int = 0
    ):
        kind = device.type if device.type in ROWS else "cuda"
        self.spec, self.sizes, self.groups = spec, sizes, groups
        self.tile = TILE_ELEMENTS[kind]
        self.elements = min(elements or self.tile, self.tile)
        heads, rows = sizes["B"] * sizes["H"], sizes["T"]
        step = ROWS[kind]
        while step > 16 and step // 2 >= rows:
            step //= 2
        while step * sizes["S"] > self.tile and step > 32:
            step //= 2
        if heads and sizes["S"]:
            while step < rows and 2 * step * sizes["S"] * heads <= self.tile:
                step *= 2
        self.rows = list(key_ranges(spec, sizes, step)) if rows and heads else []
        self.fill = program_of(spec).fill
        # a row without a live key gives zeros whichever keys are looked at
        self.exact = self.fill is None or (spec.safe and self.fill == -math.inf)
        self.doubtful: set[int] | None = None  # unknown

    def widen(self, logsumexp: Tensor) -> set[int]:
        """Finds the rows without a live key. Those that leave keys out take all keys instead: gives their numbers."""
        self.doubtful = set()
        if self.exact or self.fill is None or not logsumexp.numel() or rows_live(self.spec, self.sizes):
            return set()
        dead = ~(logsumexp > self.fill / 2).all(dim=1).all(dim=0)  # NaN counts as dead
        if not bool(dead.any()):
            return set()
        self.doubtful = self.holding(dead)
        wide = {n for n in self.doubtful if (self.rows[n].j0, self.rows[n].j1) != (0, self.sizes["S"])}
        for n in wide:
            self.rows[n] = KeyRange(self.rows[n].i0, self.rows[n].i1, 0, self.sizes["S"], False)
        return wide

    def holding(self, some: Tensor) -> set[int]:
        """Numbers of the ranges of rows that hold one of `some`, (T,) of bool."""
        some = some.cpu()
        return {n for n, r in enumerate(self.rows) if bool(some[r.i0 : r.i1].any())}

    def blocks(self, which: set[int] | None = None) -> Iterator[list[Block]]:
        """For each range of rows, its blocks over batches and heads."""
        size_b, size_g = self.sizes["B"], self.groups
        per_group = max(1, self.sizes["H"] // max(size_g, 1))
        # the number of a block must not depend on its key range, which may have been widened
        for n, r in enumerate(self.rows):
            if which is not None and n not in which:
                continue
            fit = max(1, self.tile // max(1, (r.i1 - r.i0) * (r.j1 - r.j0) * per_group))
            out = []
            step_b, step_g = (max(1, fit // size_g), size_g) if fit >= size_g else (1, fit)
            for b in range(0, size_b, step_b):
                for g in range(0, size_g, step_g):
                    number = (n * size_b + b) * size_g + g
                    live = self.doubtful is not None and n not in self.doubtful
                    out.append(Block(number, b, min(b + step_b, size_b), g, min(g + step_g, size_g), *r, live))
            if self.elements == self.tile:
                yield out
            else:
                for block in out:
                    yield from self._parts(block, per_group)

    def _parts(self, whole: Block, per_group: int) -> Iterator[list[Block]]:
        """A block in parts of no more than `elements` scores, as far as a group of heads and LEAST_ROWS allow it; for
        each range of rows, its parts."""
        row = max(1, (whole.j1 - whole.j0) * per_group)
        rows = min(max(self.elements // row, LEAST_ROWS), max(whole.i1 - whole.i0, 1))
        fit, groups = max(1, self.elements // (row * rows)), whole.g1 - whole.g0
        step_b, step_g = (fit // groups, groups) if fit >= groups else (1, fit)
        for i in range(whole.i0, max(whole.i1, whole.i0 + 1), rows):
            yield [
                whole._replace(
                    b0=b, b1=min(b + step_b, whole.b1), g0=g, g1=min(g + step_g, whole.g1), i0=i,
                    i1=min(i + rows, whole.i1), whole=whole,
                )
                for b in range(whole.b0, whole.b1, step_b) for g in range(whole.g0, whole.g1, step_g)
            ]  # fmt: skip


class Run:
    """One call: its tensors in the compute type, heads merged with batches where matmul wants them so."""

    def __init__(self, call: Call, elements: int = 0):
        self.call = call
        self.spec, self.program = call.spec, program_of(call.spec)
        self.compute = call.compute
        self.captures, self.sizes = call.captures, call.sizes
        query, key = call.query, call.key
        self.groups = key.shape[1]
        self.repeat = query.shape[1] // max(self.groups, 1)
        self.device = query.device
        self.query = query
        # tensor cores multiply halves exactly and add in float32; a CPU's would round the sums
        halves = query.device.type == "cuda" and query.dtype.itemsize == 2
        self.factor = query.dtype if halves else self.compute
        self.key = key.to(self.factor).contiguous()
        self.value = self.key if call.value is key else call.value.to(self.factor).contiguous()
        self.plan = Plan(self.spec, self.sizes, self.groups, query.device, elements)
        self._first_seed: int | None = None
        self._drawn: tuple[int, Tensor] | None = None  # of the block that parts are computed of: its number, what stays

    def keys(self, x: Tensor, at: Block) -> Tensor:
        """(B, G, S, E) to the block's (b * g, s, E)."""
        part = x[at.b0 : at.b1, at.g0 : at.g1, at.j0 : at.j1]
        return part.reshape(-1, *part.shape[2:])

    def add_keys(self, total: Tensor, at: Block, part: Tensor) -> None:
        """Adds the block's (b * g, s, E) to (B, G, S, E)."""
        b, g = at.b1 - at.b0, at.g1 - at.g0
        total[at.b0 : at.b1, at.g0 : at.g1, at.j0 : at.j1] += part.view(b, g, *part.shape[1:])

    def heads(self, at: Block) -> tuple[int, int]:
        return at.g0 * self.repeat, at.g1 * self.repeat

    def queries(self, x: Tensor, at: Block) -> Tensor:
        """(B, H, T, E) to the block's (b * g, r * t, E), ready to multiply."""
        h0, h1 = self.heads(at)
        part = x[at.b0 : at.b1, h0:h1, at.i0 : at.i1].to(self.factor)
        return part.reshape((at.b1 - at.b0) * (at.g1 - at.g0), -1, x.shape[-1])

    def tile(self, x: Tensor, at: Block) -> Tensor:
        """The block's (b * g, r * t, s) as (b, h, t, s)."""
        h0, h1 = self.heads(at)
        return x.view(at.b1 - at.b0, h1 - h0, at.i1 - at.i0, -1)

    def merged(self, x: Tensor, at: Block) -> Tensor:
        """The inverse of `tile`."""
        return x.reshape((at.b1 - at.b0) * (at.g1 - at.g0), -1, x.shape[-1])

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """The batched matrix product in the compute type."""
        if self.factor == self.compute:
            return torch.bmm(x, y)
        return torch.bmm(x.to(self.factor), y, out_dtype=self.compute)

    def evaluator(self, at: Block, shared: dict) -> Evaluator:
        axes = block_axes((at.b0, at.b1), self.heads(at), (at.i0, at.i1), (at.j0, at.j1))
        return Evaluator(self.captures, self.sizes, axes, self.compute, self.device, shared=shared)

    def score(self, at: Block, values: Evaluator, query: Tensor) -> Tensor:
        """The scores of the block, (b, h, t, s)."""
        program = self.program
        exact = self.factor == self.compute  # else scaling a query would round it
        dot = self.product(self.scaled(query) if exact else query, self.keys(self.key, at).mT)
        dot = self.tile(dot if exact else self.scaled(dot), at)
        values.bind(A.DOT, dot)
        score = values.tensor(program.kept if at.full else program.score)
        return score if score.shape == dot.shape else score.expand(dot.shape)

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.program.scale == 1.0 else x * self.program.scale

    def extra(self, values: Evaluator, shape: tuple[int, ...]) -> list[Tensor]:
        return [values.tensor(e).expand(shape) for e in self.spec.extra]

    def normalise(self, score: Tensor, extra: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """exp(score - m), its sum with the extra logits', and m: the last two (b, h, t, 1)."""
        m = score.amax(-1, keepdim=True)
        for e in extra:
            m = torch.maximum(m, e)
        if self.spec.safe:
            m = torch.where(m == -math.inf, 0.0, m)
        e = (score - m).exp_()
        total = e.sum(-1, keepdim=True)
        for x in extra:
            total = total + (x - m).exp()
        return e, total, m

    def divisor(self, total: Tensor) -> Tensor:
        """What the exponentials are divided by."""
        return torch.where(total == 0, 1.0, total) if self.spec.safe else total

    def weights(self, values: Evaluator, prob: Tensor) -> Tensor:
        """The weights before dropout, of the probabilities."""
        if self.spec.weight is A.PROB:
            return prob
        values.bind(A.PROB, prob)
        return values.tensor(self.spec.weight).expand(prob.shape)

    def drop(self, at: Block, like: Tensor) -> Tensor | None:
        """The factor of each weight under dropout: 0, or 1 / (1 - p)."""
        p = self.spec.dropout
        if p <= 0.0:
            return None
        if p >= 1.0:
            return torch.zeros_like(like)
        if at.whole is None:
            kept = self._draw(at, p)
        else:
            if self._drawn is None or self._drawn[0] != at.number:
                self._drawn = (at.number, self._draw(at.whole, p))
            (h0, h1), first, _ = self.heads(at), *self.heads(at.whole)
            kept = self._drawn[1][
                at.b0 - at.whole.b0 : at.b1 - at.whole.b0, h0 - first : h1 - first,
                at.i0 - at.whole.i0 : at.i1 - at.whole.i0,
            ]  # fmt: skip
        return kept.to(like.dtype).div_(1.0 - p)

    def _draw(self, at: Block, p: float) -> Tensor:
        """Which weights of a block stay, as bool."""
        if self._first_seed is None:
            assert self.call.seed is not None
            self._first_seed = int(self.call.seed.item())
        generator = torch.Generator(device=self.device)
        generator.manual_seed(mix(self._first_seed, at.number))
        h0, h1 = self.heads(at)
        shape = (at.b1 - at.b0, h1 - h0, at.i1 - at.i0, at.j1 - at.j0)
        return torch.empty(shape, dtype=torch.bool, device=self.device).bernoulli_(1.0 - p, generator=generator)


def mix(seed: int, number: int) -> int:
    """One 63-bit seed of two numbers (splitmix64's finaliser)."""
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1


def forward(call: Call, run: Run | None = None, elements: int = 0) -> tuple[Tensor, Tensor]:
    """out (B, H, T, Dv) in the spec's dtype, logsumexp (B, H, T) in its compute type (zeros without a softmax).
    `run` is one of this call, where its dropout is another; `elements` are the most scores at once, 0 for a tile's."""
    out = output_like(call.query, call.value.shape[-1], call.out_dtype)
    logsumexp = call.query.new_zeros(call.query.shape[:3], dtype=call.compute)
    forward_rows(Run(call, elements) if run is None else run, None, out, logsumexp)
    return out, logsumexp


def forward_rows(run: Run, which: set[int] | None, out: Tensor, logsumexp: Tensor) -> None:
    """Computes the ranges of rows of those numbers (None: all) into `out` and `logsumexp`."""
    for blocks in run.plan.blocks(which):
        _forward_blocks(run, blocks, out, logsumexp)
    if run.spec.normaliser == "softmax" and (wide := run.plan.widen(logsumexp)):
        for blocks in run.plan.blocks(wide if which is None else wide & which):
            _forward_blocks(run, blocks, out, logsumexp)


def _forward_blocks(run: Run, blocks: list[Block], out: Tensor, logsumexp: Tensor) -> None:
    spec = run.spec
    shared: dict = {}
    for at in blocks:
        h0, h1 = run.heads(at)
        where = (slice(at.b0, at.b1), slice(h0, h1), slice(at.i0, at.i1))
        values = run.evaluator(at, shared)
        if at.j0 == at.j1:
            out[where] = 0
            if spec.normaliser == "softmax":
                extra = run.extra(values, (*logsumexp[where].shape, 1))
                logsumexp[where] = torch.cat(extra, -1).logsumexp(-1) if extra else -math.inf
            continue
        score = run.score(at, values, run.queries(run.query, at))
        total = None
        if spec.normaliser == "softmax":
            weight, total, m = run.normalise(score, run.extra(values, (*score.shape[:3], 1)))
            logsumexp[where] = torch.where(m == -math.inf, m, total.log() + m).squeeze(-1)
            total = run.divisor(total)
        else:
            weight = score
        if spec.weight is not A.PROB:
            if total is not None:
                weight, total = weight / total, None
            weight = run.weights(values, weight)
        if (kept := run.drop(at, score)) is not None:
            weight = weight * kept
        part = run.tile(run.product(run.merged(weight, at), run.keys(run.value, at)), at)
        out[where] = part if total is None else part.div_(total)


def backward(
    call: Call, grad_out: Tensor, out: Tensor, logsumexp: Tensor, run: Run | None = None, elements: int = 0
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of query, key, value, and of the captures whose `grad` is True, each as its tensor is, contiguous."""
    run = Run(call, elements) if run is None else run
    if call.spec.normaliser == "softmax":
        run.plan.widen(logsumexp)
    grads = Gradients(run)
    through = ThroughValues(run, grad_out)
    for blocks in run.plan.blocks():
        grads.add_blocks(blocks, through)
    return grads.query, grads.key.to(call.key.dtype), through.value.to(call.value.dtype), grads.of_captures()


class ThroughValues:
    """The gradient of the weights of a block from that of the output; adds up the gradient of the values."""

    def __init__(self, run: Run, grad_out: Tensor):
        self.run, self.grad_out = run, grad_out
        self.value = torch.zeros_like(run.value, dtype=run.compute)

    def __call__(self, at: Block, weight: Tensor) -> Tensor:
        run = self.run
        grad = run.queries(self.grad_out, at)
        run.add_keys(self.value, at, run.product(run.merged(weight, at).mT, grad))
        return run.tile(run.product(grad, run.keys(run.value, at).mT), at)


class Gradients:
    """The sums that the blocks of a backward pass add to, in the compute type: of query, key and the captures."""

    def __init__(self, run: Run, query: Tensor | None = None):
        """`query` is filled block by block; without it, zeros are made."""
        self.run = run
        like = run.call.query
        self.query = torch.zeros(like.shape, dtype=like.dtype, device=like.device) if query is None else query
        self.key = torch.zeros_like(run.key, dtype=run.compute)
        self.captures = {
            n: torch.zeros(run.captures[n].shape, dtype=run.compute, device=run.device)
            for n, c in enumerate(run.spec.captures)
            if c.grad
        }

    def of_captures(self) -> list[Tensor]:
        return [x.to(self.run.captures[n].dtype) for n, x in self.captures.items()]

    def add_blocks(self, blocks: list[Block], of_weights: Callable[[Block, Tensor], Tensor]) -> None:
        """Adds the blocks of one range of rows; `of_weights(block, weights)` gives the gradient of the weights."""
        shared: dict = {}
        for at in blocks:
            if at.j0 < at.j1:  # without a key, nothing depends on anything
                self._add(at, shared, of_weights)

    def _add(self, at: Block, shared: dict, of_weights: Callable[[Block, Tensor], Tensor]) -> None:
        run, spec, program = self.run, self.run.spec, self.run.program
        h0, h1 = run.heads(at)
        where = (slice(at.b0, at.b1), slice(h0, h1), slice(at.i0, at.i1))
        values = run.evaluator(at, shared)
        query = run.queries(run.query, at)
        score = run.score(at, values, query)
        extra = run.extra(values, (*score.shape[:3], 1))
        # Not exp(score - logsumexp): where scores are huge, logsumexp is too coarse, and a fill swallows its log.
        if spec.normaliser == "softmax":
            prob, total, m = run.normalise(score, extra)
            total = run.divisor(total)
            prob.div_(total)
        else:
            prob, total, m = score, score, score
        weight = run.weights(values, prob)
        kept = run.drop(at, score)
        slope = of_weights(at, weight if kept is None else weight * kept)
        if kept is not None:
            slope = slope * kept
        if spec.weight is not A.PROB:
            slope = self._through(program.weights, slope, values)
        if spec.normaliser == "softmax":
            share = (prob * slope).sum(-1, keepdim=True)
            slope = (slope - share).mul_(prob)
            rows = values.without("j")
            for logit, loads in zip(extra, program.extras):
                for load, local in loads:
                    part = -share * (logit - m).exp() / total * rows(local)
                    rows.add_gradient(load, part, self.captures[load.value])  # type: ignore[index]
        bare = at.full or (program.tame and at.live)
        slope = self._through(program.kept_slopes if bare else program.slopes, slope, values)
        flat = run.merged(slope, at)
        self.query[where] = run.tile(run.scaled(run.product(flat, run.keys(run.key, at))), at)
        run.add_keys(self.key, at, run.scaled(run.product(flat.mT, query)))

    def _through(self, slopes: tuple[tuple[Expr, Expr], ...], slope: Tensor, values: Evaluator) -> Tensor:
        """The chain rule through one program; gives the slope of its first leaf, which is dot or prob."""
        for leaf, local in slopes[1:]:
            values.add_gradient(leaf, self._times(slope, local, values), self.captures[leaf.value])  # type: ignore[index]
        return self._times(slope, slopes[0][1], values)

    def _times(self, slope: Tensor, local: Expr, values: Evaluator) -> Tensor:
        if local is A.const(1.0):
            return slope
        if local.op == "where" and _ZERO in local.args[1:]:  # zero even where the slope is not a number
            x, y = (0.0 if a is _ZERO else self._times(slope, a, values) for a in local.args[1:])
            return torch.where(values.tensor(local.args[0]), x, y)
        return slope * values(local)
