"""Summarize a mask given by tensors at run time, and list the tiles that kernels visit.

`summary_kernel` evaluates the mask once for each grain of scores. All heads, layers and passes with this mask share the
result. `lists_kernel` combines it with the part of the mask that the indices alone decide, and lists the live tiles of
one kernel's blocks.
"""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f
from attnfx.mask.additive import DROWNED

LARGEST_DROWNED = tl.constexpr(DROWNED * 1.4426950408889634)


@triton.jit
def summary_kernel(
    states, captures, sizes, BM: tl.constexpr, BN: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr, SCORE: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """Compute states, uint8 (B or 1, H or 1, grains of rows, grains of keys). Grid (grains, H or 1, B or 1).

    A state is the sum of 1 if some score of the grain is live, 2 if KEEP is false for some, and 4 if each row has a
    live score. If the mask does not depend on the row, BM is 1 and there is one grain of rows; the same holds for keys
    and BN. SCORE with a dot of zero is the addend; SCALE converts it to units of log 2. SCORE and KEEP may be None."""
    size_t, size_s = (sizes[2] >> 1) if BY_ROW else 1, (sizes[3] >> 1) if BY_COLUMN else 1
    place, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    across = tl.cdiv(size_s, BN)
    row, key = f.indices(place // across * BM, BM, False), f.indices(place % across * BN, BN, True)
    i, j = f.clamped(row, size_t), f.clamped(key, size_s)
    H = HEADS(captures, sizes, b, h)
    R = ROWS(captures, sizes, H, b, h, i)
    C = COLUMNS(captures, sizes, H, b, h, j)
    exists = tl.broadcast_to((row < size_t) & (key < size_s), [BM, BN])
    keep = exists
    if KEEP is not None:
        keep = exists & KEEP(captures, sizes, H, R, C, i, i, b, h, i, j)
    live = keep
    if SCORE is not None:
        zero = tl.zeros([BM, BN], tl.float32)
        added = f.full(SCORE(captures, sizes, H, R, C, zero, zero, b, h, i, j), BM, BN) * SCALE
        live = keep & ~(added <= LARGEST_DROWNED)  # a NaN is live
    of_row = tl.max(tl.where(live, 1, 0), 1)
    dead = tl.max(tl.max(tl.where(exists & ~keep, 2, 0), 1), 0)
    beyond = tl.min(tl.where(exists, 0, 1), 1)
    state = tl.max(of_row, 0) | dead | tl.min(of_row | beyond, 0) * 4
    row = (b.to(tl.int64) * tl.num_programs(1) + h) * tl.num_programs(0) + place
    tl.store(states + row, state.to(tl.uint8))


@triton.jit
def lists_kernel(
    states, fixed, table, span, ends, order, sizes,
    OWN: tl.constexpr, STEP: tl.constexpr, GRAIN: tl.constexpr, TILES: tl.constexpr, SURE: tl.constexpr,
    PER_GROUP: tl.constexpr,
):  # fmt: skip
    """List the live tiles of a kernel's blocks, each OWN long, which it visits in steps of STEP. Grid (blocks, H or 1,
    B or 1).

    `fixed` (blocks, 4) are the walks by the indices alone, and `table` (blocks, tiles) their states or None, as in
    `host/ranges.py`. For a single block, `fixed` may be None; then `span` has its four numbers and a gap [first, end)
    among them, each n as 2 n + 1. The PER_GROUP heads of a group share a list.

    Write [0, 0, full, live] to ends (B or 1, H or 1, blocks, 4). Write the first index of each live tile to order
    (B or 1, H or 1, blocks, tiles): first the `full` tiles without a dead score, then the others, `live` in all. If
    order is absent, write [first, first, first, last] to ends, a range that contains every live tile. TILES is a power
    of two, at least the number of tiles. With SURE, all tiles count as live unless each row of the block is certain to
    have a live key. sizes = (grains along the kernel's own index, grains along the walk, strides of both, tiles, the
    length of the walk), each n as 2 n + 1."""
    own, walked = sizes[0] >> 1, sizes[1] >> 1
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = b.to(tl.int64) * tl.num_programs(1) + h
    row = head * tl.num_programs(0) + block
    at = tl.arange(0, TILES) * STEP
    if fixed is None:
        start, full_start, full_end, end = span[0] >> 1, span[1] >> 1, span[2] >> 1, span[3] >> 1
    else:
        start, end = tl.load(fixed + 4 * block), tl.load(fixed + 4 * block + 3)
        full_start, full_end = tl.load(fixed + 4 * block + 1), tl.load(fixed + 4 * block + 2)
    grain = at // GRAIN * GRAIN
    certain = (grain >= full_start) & (grain + (STEP if STEP > GRAIN else GRAIN) <= full_end)
    state, doubt = tl.zeros([TILES], tl.int32), own * 0
    GRAINS: tl.constexpr = (OWN + GRAIN - 1) // GRAIN
    for n in tl.static_range(PER_GROUP * GRAINS):
        # an index beyond the last grain is past the end of the block, or the mask has a single shared grain
        mine = tl.minimum(block * OWN // GRAIN + n % GRAINS, own - 1) * (sizes[2] >> 1)
        matrix = (head * PER_GROUP + n // GRAINS) * own * walked
        some = tl.zeros([TILES], tl.int32)
        for m in tl.static_range((STEP + GRAIN - 1) // GRAIN):
            theirs = tl.minimum(at // GRAIN + m, walked - 1) * (sizes[3] >> 1)
            some |= tl.load(states + matrix + mine + theirs).to(tl.int32)
        state |= some
        if SURE:
            doubt |= 4 - tl.max(tl.where(certain, some & 4, 0), 0)
    live = ((state & 1) != 0) & (at >= start) & (at < end)
    inside = (at >= full_start) & (at + STEP <= full_end)
    if fixed is None:
        live = live & ((at < (span[4] >> 1)) | (at >= (span[5] >> 1)))
    if table is not None:
        tiles = sizes[4] >> 1
        known = tl.load(table + block * tiles + tl.minimum(at // STEP, tiles - 1)).to(tl.int32)
        live, inside = live & ((known & 1) != 0), (known & 2) == 0
    if SURE:
        live = tl.where(doubt > 0, at < (sizes[5] >> 1), live)
    if order is None:
        first, last = tl.min(tl.where(live, at, 2147483647), 0), tl.max(tl.where(live, at + STEP, 0), 0)
        tl.store(ends + 4 * row, first)
        tl.store(ends + 4 * row + 1, first)
        tl.store(ends + 4 * row + 2, first)
        tl.store(ends + 4 * row + 3, last)
    else:
        full = live & ((state & 2) == 0) & inside
        some, every = full.to(tl.int32), live.to(tl.int32)
        count = tl.sum(some, 0)
        place = tl.where(full, tl.cumsum(some, 0) - 1, count + tl.cumsum(every - some, 0) - 1)
        tl.store(order + row * (sizes[4] >> 1) + place, at, mask=live)
        tl.store(ends + 4 * row, 0)
        tl.store(ends + 4 * row + 1, 0)
        tl.store(ends + 4 * row + 2, count)
        tl.store(ends + 4 * row + 3, tl.sum(every, 0))
