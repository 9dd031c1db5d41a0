"""Functions that the backward kernels share. Weights are recomputed from logsumexp, and sums avoid atomics.

`delta_kernel` prepares the statistics of each row. The kernels in `backward_keys`, `backward_rows` and `pairs` compute
the gradients of the call's operands, or with LEAF the gradient of one load of the program.

A float32 logsumexp is coarse for huge scores: at 1e5, weights would be wrong by about 0.4%. For float32 inputs,
`rows_kernel` therefore runs first, sums its recomputed weights, and stores the logarithm of the sum in `correction`.
"""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f


@triton.jit
def delta_kernel(
    grad_out, out, logsumexp, statistics, grad_strides, out_strides, sizes,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, DEAD: tl.constexpr,
):  # fmt: skip
    """Compute the row statistics: logsumexp in units of log 2, and delta = sum over the last dim of grad_out * out.

    Grid (row blocks, H, B); statistics is float32 (B, H, T, 2). The two are adjacent because every step of the pass
    over keys needs both for each of its rows, and so copies and loads them together. A row whose logsumexp is at most
    DEAD (None disables this) gets infinity, which makes its weights zero and marks it as without a live key."""
    size_h, size_t = sizes[1] >> 1, sizes[2] >> 1
    i0, h, b = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2).to(tl.int64)
    x = f.load_tile(grad_out, grad_strides, b, h, i0, size_t, BM, DV, BDV, True)
    y = f.load_tile(out, out_strides, b, h, i0, size_t, BM, DV, BDV, True)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    i = i0 + tl.arange(0, BM)
    at = (b * size_h + h) * size_t + i
    tl.store(statistics + 2 * at + 1, total, mask=i < size_t)
    lse = tl.load(logsumexp + at, mask=i < size_t, other=0.0)
    scaled = lse * f.LOG2E
    if DEAD is not None:
        scaled = tl.where(lse <= DEAD, float("inf"), scaled)
    tl.store(statistics + 2 * at, scaled, mask=i < size_t)


@triton.jit
def row_number(at, left, BM: tl.constexpr, STEP: tl.constexpr, TURNED: tl.constexpr, CHECK: tl.constexpr):
    """Load one value per row, at `at` and a stride of STEP, for BM rows: (BM, 1), or TURNED (1, BM). With CHECK, return
    zero beyond the `left` rows that exist."""
    n = tl.arange(0, BM)
    x = tl.load(at + STEP * n, mask=n < left, other=0.0) if CHECK else tl.load(at + STEP * n)
    return x[None, :] if TURNED else x[:, None]


@triton.jit
def row_statistics(at, correction, row, left, BM: tl.constexpr, TURNED: tl.constexpr, CHECK: tl.constexpr,
                   SCORE: tl.constexpr):  # fmt: skip
    """Load logsumexp and its correction (from `row`, or zero), in units of log 2, as `row_number` does; zeros without a
    softmax."""
    l2, c2 = 0.0, 0.0
    if SCORE is not None:
        l2 = row_number(at, left, BM, 2, TURNED, CHECK)
        if correction is not None:
            c2 = row_number(correction + row, left, BM, 1, TURNED, True)
    return l2, c2


@triton.jit
def both_statistics(at, left, BM: tl.constexpr, CHECK: tl.constexpr):
    """Load logsumexp and delta, (1, BM) each, with one load, which takes fewer instructions and more registers."""
    n = tl.arange(0, BM)[:, None]
    at += 2 * n + tl.arange(0, 2)[None, :]
    both = tl.load(at, mask=n < left, other=0.0) if CHECK else tl.load(at)
    l2, delta = tl.split(both)
    return l2[None, :], delta[None, :]


@triton.jit
def dead_statistics(dead, statistics, at, i, size_t, SUMMED: tl.constexpr):
    """Load the statistics of the rows i without a live key.

    Return whether each row is such a row; its logsumexp in natural units, in which a fill stays finite (infinity for
    all other rows); and with SUMMED the log2 of the sum of exp(score - logsumexp), else zero. dead is (whether a batch
    and head has such rows (B, H), logsumexp (B, H, T), that logarithm (B, H, T))."""
    lost = tl.load(statistics + 2 * at, mask=i < size_t, other=0.0) == float("inf")
    lse = tl.load(dead[1] + at, mask=lost, other=float("inf"))
    c2 = tl.load(dead[2] + at, mask=lost, other=0.0) if SUMMED else i * 0.0
    return lost, lse, c2


@triton.jit
def tile_gradients(
    dot, dp, l2, c2, delta, at, captures, sizes, seed, H, R, C, b, h, i0, i, j0, j,
    BM: tl.constexpr, BN: tl.constexpr, TURNED: tl.constexpr, CHECK: tl.constexpr, SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    CORRECT: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr, SLOPE: tl.constexpr,
    LEAF: tl.constexpr, LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Compute a tile's gradients from dot = q . k and dp = grad_out . v, both (BM, BN), or TURNED (BN, BM).

    w     the weights that multiply the values
    ds    the derivative by the score, times SLOPE, zero if masked (without a softmax: by the weight before dropout,
          times SLOPE); with LEAF, by that load
    prob  the normalized weight

    `at` points to the tile's statistics. Unless delta is given, it is loaded from there after the weights are computed;
    earlier, it would occupy registers next to both products. With NATURAL, SCORE and l2 are in natural units.
    """
    X: tl.constexpr = BN if TURNED else BM
    Y: tl.constexpr = BM if TURNED else BN
    live = dp
    if CHECK:
        row, key = f.indices(i0, BM, TURNED), f.indices(j0, BN, not TURNED)
        live = tl.broadcast_to((row < (sizes[2] >> 1)) & (key < (sizes[3] >> 1)), [X, Y])
        if KEEP is not None:
            live = live & KEEP(captures, sizes, H, R, C, dot, dot, b, h, i, j)
    dw = dp
    if THRESHOLD is not None:
        kept = f.survives(seed, b, h, i0, j0, sizes[1] >> 1, THRESHOLD, BM, BN, TURNED)
        dw = tl.where(kept, dp * RESCALE, 0.0)
    prob = dot
    if SCORE is None:
        w = f.full(WEIGHT(captures, sizes, H, R, C, dot, dot, b, h, i, j), X, Y)
        ds = dw
    else:
        s = f.full(SCORE(captures, sizes, H, R, C, dot, dot, b, h, i, j), X, Y)
        if CHECK:
            s = tl.where(live, s, float("-inf"))
        if NATURAL:
            prob = tl.exp2((s - l2) * f.LOG2E - c2)
        elif CORRECT:
            prob = tl.exp2((s * SCALE - l2) - c2)
        else:
            prob = tl.exp2(s * SCALE - l2)
        w = prob
        if delta is None:
            delta = row_number(at + 1, (sizes[2] >> 1) - i0, BM, 2, TURNED, CHECK or not TURNED)
        if WEIGHT is None:
            ds = prob * (dw - delta)
        else:
            factor = f.full(WEIGHT(captures, sizes, H, R, C, dot, dot, b, h, i, j), X, Y)
            w = prob * factor
            ds = prob * (dw * factor - delta)
    if SLOPE is not None:
        slope = SLOPE(captures, sizes, H, R, C, dot, dot, b, h, i, j)
        ds = ds * slope
        if NATURAL:  # even in a row of NaN: `where` passes a zero gradient to the branch not taken
            ds = tl.where(slope == 0.0, 0.0, ds)
    if CHECK:
        ds = tl.where(live, ds, 0.0)
        w = tl.where(live, w, 0.0)
    if THRESHOLD is not None:
        w = tl.where(kept, w * RESCALE, 0.0)
    if LEAF is not None:
        by_score = LEAF_SCORES(captures, sizes, H, R, C, dot, prob, b, h, i, j)
        by_weight = LEAF_WEIGHTS(captures, sizes, H, R, C, dot, prob, b, h, i, j)
        ds = ds * by_score[LEAF]
        if NATURAL:
            ds = tl.where(by_score[LEAF] == 0.0, 0.0, ds)
        ds += dw * by_weight[LEAF]
        if CHECK:
            ds = tl.where(live, ds, 0.0)
    return w, ds, prob
