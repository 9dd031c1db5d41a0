"""What the backward kernels share: weights are computed again from logsumexp, and nothing is added up by atomics.

`delta_kernel` prepares a row's numbers. Of the kernels in `backward_keys`, `backward_rows` and `pairs`, each gives the
gradient of one tensor of the call, or with LEAF that of one load of the program.

A logsumexp of float32 is coarse where scores are huge: at 1e5, weights would be wrong by some 0.4%. For inputs of
float32 `rows_kernel` therefore runs first, adds up the weights it computed, and leaves the logarithm of the sum in
`correction`.
"""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f


@triton.jit
def delta_kernel(
    grad_out, out, logsumexp, statistics, grad_strides, out_strides, sizes,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, DEAD: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, H, B). statistics (B, H, T, 2) of float32: logsumexp in units of log 2, and delta, the sum over
    the last dim of grad_out * out. They lie side by side because the pass over keys needs both of every row at every
    step, and so copies and reads them in one go. Rows whose logsumexp is not above DEAD (None: every row counts) get
    infinity for it, which makes their weights zero and marks them as without a live key."""
    size_h, size_t = sizes[1] >> 1, sizes[2] >> 1
    i0, h, b = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2).to(tl.int64)
    x = f.load_tile(grad_out, grad_strides, b, h, i0, size_t, BM, DV, BDV, True)
    y = f.load_tile(out, out_strides, b, h, i0, size_t, BM, DV, BDV, True)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    i = i0 + tl.arange(0, BM)
    at = (b * size_h + h) * size_t + i
    tl.store(statistics + 2 * at + 1, total, mask=i < size_t)
    lse = tl.load(logsumexp + at, mask=i < size_t, other=0.0)
    if DEAD is None:
        scaled = lse * f.LOG2E
    else:
        scaled = tl.where(lse <= DEAD, float("inf"), lse * f.LOG2E)
    tl.store(statistics + 2 * at, scaled, mask=i < size_t)


@triton.jit
def row_number(at, left, BM: tl.constexpr, STEP: tl.constexpr, TURNED: tl.constexpr, CHECK: tl.constexpr):
    """A number of each of BM rows, STEP apart from where the pointer stands: (BM, 1), or TURNED (1, BM). With CHECK,
    zero beyond the `left` rows that exist."""
    n = tl.arange(0, BM)
    if CHECK:
        x = tl.load(at + STEP * n, mask=n < left, other=0.0)
    else:
        x = tl.load(at + STEP * n)
    if TURNED:
        x = x[None, :]
    else:
        x = x[:, None]
    return x


@triton.jit
def row_statistics(at, correction, left, BM: tl.constexpr, TURNED: tl.constexpr, CHECK: tl.constexpr,
                   SCORE: tl.constexpr):  # fmt: skip
    """logsumexp and its correction, in units of log 2, of rows as `row_number` has them; zeros without a softmax."""
    if SCORE is None:
        l2, c2 = 0.0, 0.0
    elif correction is None:
        l2, c2 = row_number(at, left, BM, 2, TURNED, CHECK), 0.0
    else:
        l2, c2 = row_number(at, left, BM, 2, TURNED, CHECK), row_number(correction, left, BM, 1, TURNED, True)
    return l2, c2


@triton.jit
def both_statistics(at, left, BM: tl.constexpr, CHECK: tl.constexpr):
    """logsumexp and delta of rows, (1, BM) each, by one read, which takes fewer instructions and more registers."""
    n = tl.arange(0, BM)[:, None]
    at += 2 * n + tl.arange(0, 2)[None, :]
    if CHECK:
        both = tl.load(at, mask=n < left, other=0.0)
    else:
        both = tl.load(at)
    l2, delta = tl.split(both)
    return l2[None, :], delta[None, :]


@triton.jit
def dead_statistics(dead, statistics, at, i, size_t, SUMMED: tl.constexpr):
    """Of the rows i without a live key, logsumexp in natural units, which their fill survives, and the logarithm of
    the sum of exp(score - logsumexp), zero unless SUMMED; infinity for all other rows.

    dead is (whether a head of a batch has such rows (B, H), logsumexp (B, H, T), that logarithm (B, H, T))."""
    lost = tl.load(statistics + 2 * at, mask=i < size_t, other=0.0) == float("inf")
    lse = tl.load(dead[1] + at, mask=lost, other=float("inf"))
    if SUMMED:
        c2 = tl.load(dead[2] + at, mask=lost, other=0.0)
    else:
        c2 = i * 0.0
    return lost, lse, c2


@triton.jit
def tile_gradients(
    dot, dp, l2, c2, delta, at, captures, sizes, seed, H, R, C, b, h, i0, i, j0, j,
    BM: tl.constexpr, BN: tl.constexpr, TURNED: tl.constexpr, CHECK: tl.constexpr, SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    CORRECT: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr, SLOPE: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """From the scores' dot products and dp = grad_out . v of a tile, (BM, BN) or TURNED (BN, BM):

    w     the weights that multiply the values
    ds    the derivative by the score, times SLOPE, zero where masked (without a softmax: dw times SLOPE)
    dw    the derivative by the weight before dropout
    prob  the normalised weight
    live  where neither the mask nor an end masks; of no meaning without CHECK

    `at` is where the tile's statistics stand. Where delta is None, it is read from there once the weights are known:
    before, it would take registers beside both products. With NATURAL, SCORE and l2 are in natural units.
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
        if NATURAL:  # a row of NaN: `where` gives its other branch no gradient
            ds = tl.where(slope == 0.0, 0.0, ds)
    if CHECK:
        ds = tl.where(live, ds, 0.0)
        w = tl.where(live, w, 0.0)
    if THRESHOLD is not None:
        w = tl.where(kept, w * RESCALE, 0.0)
    return w, ds, dw, prob, live


@triton.jit
def leaf_part(
    ds, dw, prob, live, dot, captures, sizes, H, R, C, b, h, i, j, LEAF: tl.constexpr, CHECK: tl.constexpr,
    LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """The derivative by one load, of each element of a tile."""
    by_score = LEAF_SCORES(captures, sizes, H, R, C, dot, prob, b, h, i, j)
    by_weight = LEAF_WEIGHTS(captures, sizes, H, R, C, dot, prob, b, h, i, j)
    part = ds * by_score[LEAF]
    if NATURAL:
        part = tl.where(by_score[LEAF] == 0.0, 0.0, part)
    part += dw * by_weight[LEAF]
    if CHECK:
        part = tl.where(live, part, 0.0)
    return part
