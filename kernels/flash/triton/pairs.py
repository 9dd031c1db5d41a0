"""Compute the gradients of loads that depend on both a row and a key: bias tables by distance, and full biases.

Sums avoid atomics. If the load depends on j - i alone, a program visits one diagonal of tiles and sums each diagonal of
elements. Otherwise it sums its tile over the batches and heads that share the load.
"""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f
from attnfx.kernels.flash.triton.backward import dead_statistics, row_statistics
from attnfx.kernels.flash.triton.backward_rows import rows_step


@triton.jit
def _step(
    total, q, k, v, grad_out, statistics, correction, dead, q_strides, k_strides, v_strides, grad_strides, captures,
    sizes, seed, b, h, i0, j0,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    PRECISION: tl.constexpr, LEAF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr, LEAF_SCORES: tl.constexpr,
    LEAF_WEIGHTS: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Add the derivative by the load for each element of one tile, (BM, BN), zero out of bounds. With NATURAL, add only
    the rows without a live key."""
    size_h, size_t = sizes[1] >> 1, sizes[2] >> 1
    i = f.clamped(f.indices(i0, BM, False), size_t)
    q_tile = f.load_tile(q, q_strides, b, h, i0, size_t, BM, D, BD, True)
    do = f.load_tile(grad_out, grad_strides, b, h, i0, size_t, BM, DV, BDV, True).to(q_tile.dtype)
    row = (tl.cast(b, tl.int64) * size_h + h) * size_t
    at = statistics + 2 * (row + i0)
    l2_i, c2 = row_statistics(at, correction, row + i0, size_t - i0, BM, False, True, SCORE)
    if NATURAL:
        each = f.indices(i0, BM, False)
        _lost, l2_i, c2 = dead_statistics(dead, statistics, row + each, each, size_t, True)
    H = HEADS(captures, sizes, b, h)
    R = ROWS(captures, sizes, H, b, h, i)
    total, _sums = rows_step(
        total, 0.0, q_tile, do, k, v, l2_i, c2, at, k_strides, v_strides, captures, sizes, seed, H, R, b, h, i0, i, j0,
        D, DV, BM, BN, BD, BDV, PER_GROUP, SCALE, THRESHOLD, RESCALE, PRECISION, LEAF, correction is not None, True,
        COLUMNS, SCORE, KEEP, WEIGHT, None, LEAF_SCORES, LEAF_WEIGHTS, NATURAL, True,
    )  # fmt: skip
    return total


@triton.jit
def pairs_kernel(
    q, k, v, grad_out, statistics, correction, result, q_strides, k_strides, v_strides, grad_strides, captures, sizes,
    seed, walks, dead, part,
    BY_BATCH: tl.constexpr, BY_HEAD: tl.constexpr, DIAGONAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    PRECISION: tl.constexpr, LEAF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr, LEAF_SCORES: tl.constexpr,
    LEAF_WEIGHTS: tl.constexpr, WHOLE: tl.constexpr, LEAF_WHOLES: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one load. Grid (tiles or their diagonals, H or 1, B or 1): 1 without BY_HEAD or BY_BATCH.

    Without DIAGONAL, result is (B or 1, H or 1, rows, S), for the rows from block x. part is (2 x + 3, 2 rows + 1),
    encoded so that Triton does not specialize on a 1. With DIAGONAL, BM = BN and result is (B or 1, H or 1, 2, L) with
    L = BM * (row blocks + key blocks). The sum over the elements with j - i = n - BM * row blocks is then the sum of
    result[..., 0, n] and result[..., 1, n]. walks are spans from `walks.walks_of` that skip empty tiles, or None;
    `dead` is as in `dead_statistics`, or None.
    """
    size_t, size_s = sizes[2] >> 1, sizes[3] >> 1
    batches, heads = 1 if BY_BATCH else sizes[0] >> 1, 1 if BY_HEAD else sizes[1] >> 1
    blocks_i, blocks_j = tl.cdiv(size_t, BM), tl.cdiv(size_s, BN)
    place = tl.program_id(0)
    if DIAGONAL:
        apart = place - (blocks_i - 1)
        first, last = tl.maximum(0, -apart), tl.minimum(blocks_i, blocks_j - apart)
    else:
        first = place // blocks_j + (part[0] - 3 >> 1)
        last, apart = first + 1, place % blocks_j - first
    if THRESHOLD is not None:
        seed = tl.load(seed)
    total = tl.zeros([BM, BN], tl.float32)
    n, c = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    for n_b in range(0, batches):
        for n_h in range(0, heads):
            b, h = tl.program_id(2) + n_b, tl.program_id(1) + n_h
            for block in range(first, last):
                i0, j0 = block * BM, (block + apart) * BN
                visit = j0 < size_s
                if walks is not None:
                    _place, start, _s, _e, end = f.walk(walks, b, h, block, size_s, BN)
                    visit = (j0 + BN > start) & (j0 < end)
                if visit:
                    total = _step(
                        total, q, k, v, grad_out, statistics, correction, dead, q_strides, k_strides, v_strides,
                        grad_strides, captures, sizes, seed, b, h, i0, j0, D, DV, BM, BN, BD, BDV, PER_GROUP, SCALE,
                        THRESHOLD, RESCALE, PRECISION, LEAF, HEADS, ROWS, COLUMNS, SCORE, KEEP, WEIGHT, LEAF_SCORES,
                        LEAF_WEIGHTS, False,
                    )  # fmt: skip
                if dead is not None:
                    if (j0 < size_s) & (tl.load(dead[0] + b * (sizes[1] >> 1) + h) != 0):
                        total = _step(
                            total, q, k, v, grad_out, statistics, correction, dead, q_strides, k_strides, v_strides,
                            grad_strides, captures, sizes, seed, b, h, i0, j0, D, DV, BM, BN, BD, BDV, PER_GROUP, SCALE,
                            THRESHOLD, RESCALE, PRECISION, LEAF, HEADS, ROWS, COLUMNS, WHOLE, None, WEIGHT, LEAF_WHOLES,
                            LEAF_WEIGHTS, True,
                        )  # fmt: skip
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if DIAGONAL:
        # rotate row n left by n: a diagonal becomes one column, whose wrapped part belongs to the diagonal BN lower
        turned = tl.gather(total, (c + n) % BN, 1)
        above, below = tl.sum(tl.where(c + n < BN, turned, 0.0), 0), tl.sum(tl.where(c + n < BN, 0.0, turned), 0)
        length = BM * (blocks_i + blocks_j)
        at = (apart + blocks_i) * BN + tl.arange(0, BN)
        tl.store(result + row * 2 * length + at, above)
        tl.store(result + (row * 2 + 1) * length + at - BN, below)
    else:
        i, j = place // blocks_j * BM + n, (first + apart) * BN + c
        rows = part[1] >> 1
        tl.store(result + (row * rows + i) * size_s + j, total, mask=(i < rows) & (j < size_s))
