"""Compute the memory that attention operators take while they run, beyond operands and results.

It is counted as the tiers allocate it: copies of operands in another layout, the expressions that a block evaluates
(each is kept until the block ends), the scores and tensors computed from them, and the buffers of ATen's kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from attnfx.ir import algebra as A
from attnfx.ir.expr import FLOAT, INT, Expr
from attnfx.ir.toeplitz import opaque, toeplitz
from attnfx.mask import KeyRange, key_ranges, mask_of
from attnfx.spec import AttentionSpec, I, J, additive
from attnfx.targets import sdpa_dispatch as fused

# kernels/library/cpu.py: queries of a block; kernels/chunked/blocks.py: elements of a tile, rows of a block
BLOCK, TILE, ROWS = 256, {"cpu": 1 << 20, "cuda": 1 << 26}, {"cpu": 128, "cuda": 512}
LEAST_ROWS = 16  # kernels/chunked/blocks.py: rows of a part of a block
KEYS = 512  # aten/src/ATen/native/cpu/FlashAttentionKernel.cpp: keys of a block


@dataclass(frozen=True)
class Operand:
    """A tensor of shape (B, H, T, D), its strides, and the bytes of an element."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.element

    def lies(self, order: Iterable[int]) -> bool:
        """Return whether its memory is dense, with its dims in this order, outermost first."""
        step = 1
        for d in reversed(tuple(order)):
            if self.shape[d] != 1 and self.strides[d] != step:
                return False
            step *= self.shape[d]
        return True


@dataclass(frozen=True)
class Use:
    """One call of an operator: its operands and its device. On a CPU, `threads` share a kernel's work."""

    spec: AttentionSpec
    query: Operand
    key: Operand
    value: Operand
    grad_out: Operand | None = None
    cpu: bool = True
    threads: int = 1

    @property
    def compute(self) -> int:
        """Bytes of an element in the compute type."""
        return 8 if self.spec.compute == "float64" else 4

    @property
    def sizes(self) -> dict[str, int]:
        (b, h, t, _), s = self.query.shape, self.key.shape[2]
        return {"B": b, "H": h, "T": t, "S": s}

    @property
    def width(self) -> int:
        return max(self.query.shape[3], self.value.shape[3])

    @property
    def rows(self) -> int:
        return prod(self.query.shape[:3])


def workspace(use: Use, tier: str) -> int:
    """Return the bytes alive only while a call of `attnfx::attention` runs, or with `grad_out`, its backward operator.

    `tier` is the first entry of the operator's `tier` argument, with its tile.
    """
    if not all((*use.query.shape, *use.key.shape)):
        return 0
    tier, _, tile = tier.partition(":")
    if tier == "library":
        if use.cpu:
            return _library(use)
        shapes = use.query.shape[:3], use.key.shape
        return fused.workspace(*shapes, use.value.shape[3], use.query.element) if use.grad_out else 0
    if tier in ("flash", "decode", "flex"):
        # the backward pass stores row sums of out * grad_out in float32; a split stores partial results in float32
        return 4 * use.rows if use.grad_out else (4 * use.rows * (use.value.shape[3] + 2) if tier == "decode" else 0)
    return _chunked(use, int(tile or 0) if tier == "chunked" else 0)


def held(programs: Iterable[Expr], extents: Mapping[str, int], compute: int) -> int:
    """Return the bytes of the tensors that kernels/evaluate.py allocates for expressions over a block.

    `extents` has the sizes of the block along b, h, i and j. Toeplitz expressions are computed along the diagonals.
    """
    seen: set[Expr] = set()
    total = 0

    def size(e: Expr) -> int:
        names = extents if opaque(e) else e.free & extents.keys()
        return prod(extents[name] for name in names) * (compute if e.kind == FLOAT else 8 if e.kind == INT else 1)

    stack = list(programs)
    while stack:
        e = stack.pop()
        if scaled_dot(e):
            e = A.DOT
        if e in seen or e.op in ("const", "size", "prob"):
            continue
        seen.add(e)
        total += size(e)
        if not ({"i", "j"} <= e.free and toeplitz(e) is not None):
            stack.extend(e.args)
    return total


def scaled_dot(e: Expr) -> bool:
    """Return whether an expression is a constant times the dot product, which the queries or the exponential absorb."""
    return e.op == "mul" and len(e.args) == 2 and e.args[0].op == "const" and e.args[1] is A.DOT


# -- library --------------------------------------------------------------------------------------------------------


def _layout(use: Use) -> tuple[bool, Expr, Expr, list[KeyRange]]:
    """Return (whether one call serves all queries, bias, added mask, blocks), as in kernels/library/cpu.py."""
    found = mask_of(use.spec.score)
    keep, score = (A.TRUE if found is None else found.keep), use.spec.score
    if score.op == "where" and score.args[0] is keep:
        score = score.args[1]
    parts = additive(score)
    bias = A.const(0.0) if parts is None else parts[1]
    conjuncts = keep.args if keep.op == "and" else () if keep is A.TRUE else (keep,)
    rest = tuple(e for e in conjuncts if not (e.op == "ge0" and e.args[0] is A.sub(I, J)))
    single = not any("i" in e.free for e in (*rest, bias))
    mask = A.where(A.and_(*(rest if single else conjuncts)), bias, A.const(-float("inf")))
    if single:
        return True, bias, mask, [KeyRange(0, use.sizes["T"], 0, use.sizes["S"], not rest)]
    blocks: list[KeyRange] = []
    for r in key_ranges(use.spec, use.sizes, BLOCK):
        last = blocks[-1] if blocks else None
        if last and bias is A.const(0.0) and last.full and r.full and (last.j0, last.j1) == (r.j0, r.j1):
            blocks[-1] = last._replace(i1=r.i1)
        else:
            blocks.append(r)
    return False, bias, mask, blocks


def fused_kernel(rows: int, keys: int, width: int, element: int, backward: bool, threads: int) -> int:
    """Return the bytes of the buffers of ATen's fused CPU kernel, for the longest block of each thread. `element` is
    the bytes of an operand's element."""
    block, compute = min(256 if rows >= 768 else 64 if rows >= 192 else 32, rows), max(element, 4)
    tile, half = block * min(KEYS, keys), element if element < 4 else 0
    if backward:
        return threads * (2 * tile * compute + block * compute + 2 * tile * half)
    return threads * ((tile + 2 * block + block * width) * compute + tile * half)


def _library(use: Use) -> int:
    single, bias, mask, blocks = _layout(use)
    batch, heads = use.query.shape[:2]
    groups = use.key.shape[1]
    copies = sum(
        prod(x.shape[:3]) * use.width * x.element
        for x in (use.query, use.key, use.value, use.grad_out)
        if x is not None and (x.strides[3] != 1 or x.shape[3] < use.width)
    )
    most = before = 0
    for r in blocks:
        rows, keys = r.i1 - r.i0, r.j1 - r.j0
        if not keys:
            continue
        extents = {"b": batch, "h": heads, "i": 1 if single else rows, "j": keys}
        program = bias if r.full else mask
        evaluated = held([program], extents, use.compute)
        shape = program.free & extents.keys()
        tile = prod(extents[name] for name in shape) * use.compute if shape else 0
        part = batch * heads * rows * use.width * use.query.element
        sums = batch * heads * rows * use.compute
        kernel = fused_kernel(rows, keys, use.width, use.query.element, use.grad_out is not None, use.threads)
        kernel += tile if single else 2 * tile  # the kernel copies a tile
        if use.grad_out is None:
            kept = 0 if before == 0 else part + sums  # a block's results live until the next block's exist
            most = max(most, before + evaluated, kept + kernel + part + sums)
            before = tile + part + sums
            continue
        key = batch * groups * keys * use.width * use.key.element
        if not (single and use.grad_out.lies((0, 2, 1, 3))):
            kernel += part  # the kernel needs dense rows
        if single:  # the kernel allocates the gradients; then each in turn is copied to the promised layout
            most = max(evaluated, kernel, 0 if heads == 1 else max(part, key))
        else:
            most = max(most, before + evaluated, kernel + part + 2 * key)
            before = tile
    return copies + most


# -- chunked --------------------------------------------------------------------------------------------------------


def _chunked(use: Use, elements: int) -> int:
    """Return the workspace of the chunked tier; `elements` is the most scores at once, 0 for a whole tile."""
    spec, sizes, groups = use.spec, use.sizes, use.key.shape[1]
    kind = "cpu" if use.cpu else "cuda"
    factor = use.query.element if kind == "cuda" and use.query.element == 2 else use.compute
    copies = sum(prod(x.shape) * factor for x in (use.key, use.value) if not x.lies(range(4)) or x.element != factor)
    limit, step = TILE[kind], ROWS[kind]
    while step > 16 and step // 2 >= sizes["T"]:
        step //= 2
    while step * sizes["S"] > limit and step > 32:
        step //= 2
    while step < sizes["T"] and 2 * step * sizes["S"] * sizes["B"] * sizes["H"] <= limit:
        step *= 2
    shared = max(1, sizes["H"] // max(groups, 1))
    most = 0
    for r in key_ranges(spec, sizes, step):
        rows, keys = r.i1 - r.i0, r.j1 - r.j0
        if not keys:
            continue
        fit = max(1, limit // (rows * keys * shared))
        b, g = (min(max(1, fit // groups), sizes["B"]), groups) if fit >= groups else (1, fit)
        drawn = 0
        if elements and elements < limit:  # blocks are computed in parts, but their dropout is sampled at once
            drawn = b * g * shared * rows * keys if spec.dropout else 0
            rows = min(max(elements // (keys * shared), LEAST_ROWS), rows)
            fit = max(1, elements // (keys * shared * rows))
            b, g = (min(fit // g, b), g) if fit >= g else (1, fit)
        extents = {"b": b, "h": g * shared, "i": rows, "j": keys}
        tile = prod(extents.values()) * use.compute
        score = spec.score.args[1] if r.full and spec.score.op == "where" else spec.score
        evaluated = max(held([score], extents, use.compute), tile)
        if spec.weight is not A.PROB:
            evaluated += held([spec.weight], extents, use.compute) + tile
        dropped = bool(spec.dropout)
        block = b * g * shared * rows * use.width * use.compute  # of queries, or of results
        if use.grad_out is None:
            made = (1 + 2 * dropped) * tile + (0 if dropped else block)
        else:
            made = (3 + dropped) * tile + (1 + dropped) * block
        most = max(most, evaluated + made + drawn)
    return copies + most
