"""A mask that stands in tensors, summarised at run time, and the lists of tiles that kernels visit by it.

`summary_kernel` evaluates the mask once for each grain of scores; its result serves every head, layer and pass that
has this mask. `lists_kernel` makes from it, and from what the indices alone decide, the tiles of one kernel's blocks.
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
    """Grid (grains of rows * grains of keys, H or 1, B or 1). states (B or 1, H or 1, grains of rows, of keys) of
    uint8: 1 where some score of a grain is live, plus 2 where KEEP is false for some, plus 4 where each row has a live
    one. BM or BN is 1, and there is one grain, where the mask does not depend on the row or the key. SCORE of a dot of
    zero is the addend, in units of log 2 with SCALE; None where there is none, as KEEP."""
    size_t, size_s = 1, 1
    if BY_ROW:
        size_t = sizes[2] >> 1
    if BY_COLUMN:
        size_s = sizes[3] >> 1
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
    """Grid (blocks, H or 1, B or 1) of the kernel's own index, each OWN long; it walks along the other in steps of
    STEP. `fixed` (blocks, 4) are the walks by the indices alone, as `ranges` has them, and `table` (blocks, tiles) the
    states there or None; of one block `fixed` may be None, and `span` has the four numbers and a gap in between,
    [first, end), each n as 2 n + 1. The PER_GROUP heads of a group share a list.

    ends (B or 1, H or 1, blocks, 4) becomes [0, 0, full, live], and order (B or 1, H or 1, blocks, tiles) the first
    index of `full` tiles without a dead score, then of the others up to `live` in all. Where order is None, ends
    becomes [first, first, first, last], which holds every live tile. TILES is a power of two, no less than tiles.
    With SURE, every tile counts as live unless it is certain that each row of the block has a live key.
    sizes = (grains along the kernel's own index, along the walk, the distances between either's, tiles, the length of
    the walk)."""
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
        # an index beyond the last grain is of a block that ends there, or of the one grain that all share
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
