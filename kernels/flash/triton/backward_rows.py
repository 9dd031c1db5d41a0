"""Compute the gradient of a block of queries: a program visits the keys."""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f
from attnfx.kernels.flash.triton.backward import dead_statistics, row_statistics, tile_gradients


@triton.jit
def rows_step(
    total, sums, q_tile, do, k, v, l2, c2, at, k_strides, v_strides, captures, sizes, seed, H, R, b, h, i0, i, j0,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    PRECISION: tl.constexpr, LEAF: tl.constexpr, CORRECT: tl.constexpr, CHECK: tl.constexpr, COLUMNS: tl.constexpr,
    SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr, SLOPE: tl.constexpr, LEAF_SCORES: tl.constexpr,
    LEAF_WEIGHTS: tl.constexpr, NATURAL: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Add one tile to the gradient of the queries (BM, BD); with LEAF, to the gradient of a load by row (BM,), or with
    PAIRS of a load by row and key (BM, BN)."""
    size_s = sizes[3] >> 1
    j = f.indices(j0, BN, True)
    if CHECK:
        j = f.clamped(j, size_s)
    k_tile = f.load_tile(k, k_strides, b, h // PER_GROUP, j0, size_s, BN, D, BD, CHECK)
    v_tile = f.load_tile(v, v_strides, b, h // PER_GROUP, j0, size_s, BN, DV, BDV, CHECK)
    C = COLUMNS(captures, sizes, H, b, h, j)
    dot = f.dot(q_tile, tl.trans(k_tile), None, PRECISION)
    dp = f.dot(do, tl.trans(v_tile), None, PRECISION)
    _w, ds, prob = tile_gradients(
        dot, dp, l2, c2, None, at, captures, sizes, seed, H, R, C, b, h, i0, i, j0, j, BM, BN, False, CHECK, SCALE,
        THRESHOLD, RESCALE, CORRECT and LEAF is not None, SCORE, KEEP, WEIGHT, SLOPE, LEAF, LEAF_SCORES, LEAF_WEIGHTS,
        NATURAL,
    )  # fmt: skip
    if LEAF is None:
        total = f.dot(ds.to(k_tile.dtype), k_tile, total, PRECISION)
        if CORRECT:
            sums += tl.sum(prob, 1)
    else:
        total += ds if PAIRS else tl.sum(ds, 1)
    return total, sums


@triton.jit
def rows_kernel(
    q, k, v, grad_out, statistics, correction, result, q_strides, k_strides, v_strides, grad_strides,
    result_strides, captures, sizes, seed, walks, order, dead,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, THRESHOLD: tl.constexpr,
    RESCALE: tl.constexpr, PRECISION: tl.constexpr, LEAF: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr,
    SLOPE: tl.constexpr, LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr, EXTRAS_COUNT: tl.constexpr,
    EXTRAS: tl.constexpr, WHOLE: tl.constexpr, WHOLE_SLOPE: tl.constexpr, LEAF_WHOLES: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the queries, result (B, H, T, D). Grid (row blocks, H, B).

    With LEAF, the number of a load, result is that load's gradient summed over the keys, float32 (B, H, T). walks and
    order are as in the forward kernel. `correction` (B, H, T), unless None, is written, or read with LEAF.

    If `dead` is not None, rows without a live key visit all keys with WHOLE, the score including its fill. Without
    LEAF, this writes dead[2]."""
    CORRECT: tl.constexpr = tl.constexpr(correction is not None)
    size_h, size_t, size_s = sizes[1] >> 1, sizes[2] >> 1, sizes[3] >> 1
    block, h, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i0 = block * BM
    i = f.clamped(f.indices(i0, BM, False), size_t)
    q_tile = f.load_tile(q, q_strides, b, h, i0, size_t, BM, D, BD, True)
    do = f.load_tile(grad_out, grad_strides, b, h, i0, size_t, BM, DV, BDV, True)
    do = do.to(q_tile.dtype)
    first_row = (b.to(tl.int64) * size_h + h) * size_t
    at = statistics + 2 * (first_row + i0)
    known_correction = None if LEAF is None else correction
    l2_i, c2 = row_statistics(at, known_correction, first_row + i0, size_t - i0, BM, False, True, SCORE)
    H = HEADS(captures, sizes, b, h)
    R = ROWS(captures, sizes, H, b, h, i)
    sums = tl.zeros([BM], tl.float32)
    if CORRECT and EXTRAS_COUNT > 0:
        logits = EXTRAS(captures, sizes, H, R, b, h, i)
        for x in tl.static_range(EXTRAS_COUNT):
            sums += tl.reshape(tl.exp2(f.full(logits[x], BM, 1) - l2_i), [BM])
    if THRESHOLD is not None:
        seed = tl.load(seed)
    STEP: tl.constexpr = BN if order is None else 1
    place, start, full_start, full_end, end = f.walk(walks, b, h, block, size_s, BN)
    total = tl.zeros([BM, BD] if LEAF is None else [BM], tl.float32)
    for n in range(full_start, full_end, STEP):
        j0 = f.tile_at(order, place, n, BN)
        total, sums = rows_step(
            total, sums, q_tile, do, k, v, l2_i, c2, at, k_strides, v_strides, captures, sizes, seed, H, R, b, h,
            i0, i, j0, D, DV, BM, BN, BD, BDV, PER_GROUP, SCALE, THRESHOLD, RESCALE, PRECISION, LEAF, CORRECT, False,
            COLUMNS, SCORE, None, WEIGHT, SLOPE, LEAF_SCORES, LEAF_WEIGHTS, False, False,
        )  # fmt: skip
    before = (full_start - start) // STEP
    for n in range(0, before + tl.cdiv(end - full_end, STEP)):
        t = tl.where(n < before, start + n * STEP, full_end + (n - before) * STEP)
        j0 = f.tile_at(order, place, t, BN)
        total, sums = rows_step(
            total, sums, q_tile, do, k, v, l2_i, c2, at, k_strides, v_strides, captures, sizes, seed, H, R, b, h,
            i0, i, j0, D, DV, BM, BN, BD, BDV, PER_GROUP, SCALE, THRESHOLD, RESCALE, PRECISION, LEAF, CORRECT, True,
            COLUMNS, SCORE, KEEP, WEIGHT, SLOPE, LEAF_SCORES, LEAF_WEIGHTS, False, False,
        )  # fmt: skip
    row = i0 + tl.arange(0, BM)
    if LEAF is None and CORRECT:
        known = sums > 0.0
        total = total / tl.where(known, sums, 1.0)[:, None]
        c2 = tl.where(known, tl.log2(sums), 0.0)
        tl.store(correction + first_row + row, c2, mask=row < size_t)
    if dead is not None:
        each = f.indices(i0, BM, False)
        lost, lse, share = dead_statistics(dead, statistics, first_row + each, each, size_t, LEAF is not None)
        lost_row = tl.reshape(lost, [BM])
        if tl.max(lost_row.to(tl.int32), 0) > 0:
            # in this loop the weights of all other rows are zero
            total = tl.where(lost if LEAF is None else lost_row, 0.0, total)
            parts = tl.zeros([BM], tl.float32)
            for j0 in range(0, size_s, BN):
                total, parts = rows_step(
                    total, parts, q_tile, do, k, v, lse, share, at, k_strides, v_strides, captures, sizes, seed, H,
                    R, b, h, i0, i, j0, D, DV, BM, BN, BD, BDV, PER_GROUP, SCALE, THRESHOLD, RESCALE, PRECISION, LEAF,
                    True, True, COLUMNS, WHOLE, None, WEIGHT, WHOLE_SLOPE, LEAF_WHOLES, LEAF_WEIGHTS, True, False,
                )  # fmt: skip
            if LEAF is None:
                parts = tl.where(lost_row & (parts > 0.0), parts, 1.0)
                total = total / parts[:, None]
                tl.store(dead[2] + first_row + row, tl.log2(parts), mask=lost_row)
    if LEAF is None:
        f.store_tile(result, result_strides, b, h, i0, size_t, total * FACTOR, BM, D, BD)
    else:
        tl.store(result + first_row + row, total, mask=row < size_t)
