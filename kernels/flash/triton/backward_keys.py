"""Compute the gradients of a block of keys and values: a program visits the rows of every head that shares them."""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f
from attnfx.kernels.flash.triton.backward import both_statistics, dead_statistics, row_statistics, tile_gradients


@triton.jit
def _keys_step(
    dk, dv, k_tile, v_tile, q, grad_out, at, statistics, correction, dead, q_strides, grad_strides, captures, sizes,
    seed, H, C, b, h, i0, j, j0,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr,
    LEAF: tl.constexpr, CHECK: tl.constexpr, ROWS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr,
    WEIGHT: tl.constexpr, SLOPE: tl.constexpr, LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """Add one tile to the gradients of keys (BN, BD) and values (BN, BDV); with LEAF, dk (BN,) is a load's gradient.
    `at` points to the statistics of the tile's rows. With NATURAL, add only the rows without a live key."""
    size_t = sizes[2] >> 1
    i = f.indices(i0, BM, True)
    if CHECK:
        i = f.clamped(i, size_t)
    q_tile = f.load_tile(q, q_strides, b, h, i0, size_t, BM, D, BD, CHECK)
    do = f.load_tile(grad_out, grad_strides, b, h, i0, size_t, BM, DV, BDV, CHECK)
    do = do.to(v_tile.dtype)
    R = ROWS(captures, sizes, H, b, h, i)
    dot = f.dot(k_tile, tl.trans(q_tile), None, PRECISION)
    dp = f.dot(v_tile, tl.trans(do), None, PRECISION)
    delta = None
    if correction is None and SCORE is not None:
        l2_i, delta = both_statistics(at, size_t - i0, BM, CHECK)
        c2 = 0.0
    else:
        l2_i, c2 = row_statistics(at, correction, i0, size_t - i0, BM, True, CHECK, SCORE)
    if NATURAL:
        each = f.indices(i0, BM, True)
        _lost, l2_i, c2 = dead_statistics(dead, statistics, each, each, size_t, True)
    w, ds, _prob = tile_gradients(
        dot, dp, l2_i, c2, delta, at, captures, sizes, seed, H, R, C, b, h, i0, i, j0, j, BM, BN, True, CHECK, SCALE,
        THRESHOLD, RESCALE, correction is not None, SCORE, KEEP, WEIGHT, SLOPE, LEAF, LEAF_SCORES, LEAF_WEIGHTS,
        NATURAL,
    )  # fmt: skip
    if LEAF is None:
        dv = f.dot(w.to(do.dtype), do, dv, PRECISION)
        dk = f.dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    else:
        dk += tl.sum(ds, 1)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, grad_out, statistics, correction, dk, dv, q_strides, k_strides, v_strides, grad_strides,
    dk_strides, dv_strides, captures, sizes, seed, walks, order, dead,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, THRESHOLD: tl.constexpr,
    RESCALE: tl.constexpr, PRECISION: tl.constexpr, LEAF: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr,
    SLOPE: tl.constexpr, LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_SLOPE: tl.constexpr, LEAF_WHOLES: tl.constexpr,
):  # fmt: skip
    """Compute the gradients dk (B, G, S, D) and dv (B, G, S, DV), passed with their strides. Grid (key blocks, G, B).

    walks and order come from `walks.walks_of`, or are None. `dead` is as in `dead_statistics`, or None if every row
    has a live key. FACTOR is the constant factor of d score / d dot, and SLOPE the rest, or None.

    With LEAF, the number of a load, the grid is (key blocks, H, B), and dk is that load's gradient summed over the
    rows, float32 (B, H, S); dv is not written."""
    size_h, size_t, size_s = sizes[1] >> 1, sizes[2] >> 1, sizes[3] >> 1
    block, lead, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if LEAF is None:
        g, first_h = lead, lead * PER_GROUP
    else:
        g, first_h = lead // PER_GROUP, lead
    j0 = block * BN
    j = f.clamped(f.indices(j0, BN, False), size_s)
    k_tile = f.load_tile(k, k_strides, b, g, j0, size_s, BN, D, BD, True)
    v_tile = f.load_tile(v, v_strides, b, g, j0, size_s, BN, DV, BDV, True)
    if THRESHOLD is not None:
        seed = tl.load(seed)
    STEP: tl.constexpr = BM if order is None else 1
    dk_acc = tl.zeros([BN, BD] if LEAF is None else [BN], tl.float32)
    dv_acc = tl.zeros([BN, BDV], tl.float32)
    for r in range(0, PER_GROUP if LEAF is None else 1):
        h = first_h + r
        H = HEADS(captures, sizes, b, h)
        C = COLUMNS(captures, sizes, H, b, h, j)
        row = (b.to(tl.int64) * size_h + h) * size_t
        of_head = statistics + 2 * row
        correction_h = None if correction is None else correction + row
        dead_h = None if dead is None else (dead[0] + b * size_h + h, dead[1] + row, dead[2] + row)
        place, start, full_start, full_end, end = f.walk(walks, b, h, block, size_t, BM)
        inside = j0 + BN <= size_s  # the last block of keys may reach beyond the end: check all its tiles
        full_start, full_end = tl.where(inside, full_start, start), tl.where(inside, full_end, start)
        at = of_head + 2 * full_start  # advanced in the loop: an offset from i0 would widen the counter to 64 bits
        for t in range(full_start, full_end, STEP):
            i0 = f.tile_at(order, place, t, BM)
            if order is not None:
                at = statistics + 2 * (row + i0)
            dk_acc, dv_acc = _keys_step(
                dk_acc, dv_acc, k_tile, v_tile, q, grad_out, at, of_head, correction_h, dead_h, q_strides,
                grad_strides, captures, sizes, seed, H, C, b, h, i0, j, j0, D, DV, BM, BN, BD, BDV, SCALE, THRESHOLD,
                RESCALE, PRECISION, LEAF, False, ROWS, SCORE, None, WEIGHT, SLOPE, LEAF_SCORES, LEAF_WEIGHTS, False,
            )  # fmt: skip
            at += 2 * BM
        before = (full_start - start) // STEP
        for t in range(0, before + tl.cdiv(end - full_end, STEP)):
            n = tl.where(t < before, start + t * STEP, full_end + (t - before) * STEP)
            i0 = f.tile_at(order, place, n, BM)
            dk_acc, dv_acc = _keys_step(
                dk_acc, dv_acc, k_tile, v_tile, q, grad_out, of_head + 2 * i0, of_head, correction_h, dead_h, q_strides,
                grad_strides, captures, sizes, seed, H, C, b, h, i0, j, j0, D, DV, BM, BN, BD, BDV, SCALE, THRESHOLD,
                RESCALE, PRECISION, LEAF, True, ROWS, SCORE, KEEP, WEIGHT, SLOPE, LEAF_SCORES, LEAF_WEIGHTS, False,
            )  # fmt: skip
        if dead is not None:
            if tl.load(dead_h[0]) != 0:
                for i0 in range(0, size_t, BM):
                    rows = i0 + tl.arange(0, BM)
                    marked = tl.load(of_head + 2 * rows, mask=rows < size_t, other=0.0) == float("inf")
                    if tl.max(marked.to(tl.int32), 0) > 0:
                        dk_acc, dv_acc = _keys_step(
                            dk_acc, dv_acc, k_tile, v_tile, q, grad_out, of_head + 2 * i0, of_head, correction_h,
                            dead_h, q_strides, grad_strides, captures, sizes, seed, H, C, b, h, i0, j, j0, D, DV, BM,
                            BN, BD, BDV, SCALE, THRESHOLD, RESCALE, PRECISION, LEAF, True, ROWS, WHOLE, None, WEIGHT,
                            WHOLE_SLOPE, LEAF_WHOLES, LEAF_WEIGHTS, True,
                        )  # fmt: skip
    if LEAF is None:
        f.store_tile(dk, dk_strides, b, g, j0, size_s, dk_acc * FACTOR, BN, D, BD)
        f.store_tile(dv, dv_strides, b, g, j0, size_s, dv_acc, BN, DV, BDV)
    else:
        column = j0 + tl.arange(0, BN)
        tl.store(dk + (b.to(tl.int64) * size_h + first_h) * size_s + column, dk_acc, mask=column < size_s)
