"""The backward kernels: weights are computed again from logsumexp; nothing is added up by atomics.

`delta_kernel` prepares sum(grad_out * out) of each row, `keys_kernel` the gradients of a block of keys and values (it
walks along the rows of every head that shares them), `rows_kernel` that of a block of queries. With LEAF they give
that of one load of the program instead, by key or by row.

A logsumexp of float32 is coarse where scores are huge: at 1e5, weights would be wrong by some 0.4%. For inputs of
float32 `rows_kernel` therefore runs first, adds up the weights it computed, and leaves the logarithm of the sum in
`correction`."""

import triton
import triton.language as tl

import attnfx.kernels.flash.functions as f


@triton.jit
def delta_kernel(
    grad_out, out, logsumexp, delta, l2, grad_strides, out_strides, sizes,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, DEAD: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, H, B). delta (B, H, T) of float32 = sum over the last dim of grad_out * out; l2 is logsumexp in
    units of log 2. Rows whose logsumexp is not above DEAD (None: every row counts) get infinity, which makes their
    weights zero: they are no business of these kernels."""
    size_h, size_t = sizes[1] >> 1, sizes[2] >> 1
    i0, h, b = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2).to(tl.int64)
    x = f.load_tile(grad_out, grad_strides, b, h, i0, size_t, BM, DV, BDV, True)
    y = f.load_tile(out, out_strides, b, h, i0, size_t, BM, DV, BDV, True)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    i = i0 + tl.arange(0, BM)
    at = (b * size_h + h) * size_t + i
    tl.store(delta + at, total, mask=i < size_t)
    lse = tl.load(logsumexp + at, mask=i < size_t, other=0.0)
    if DEAD is None:
        scaled = lse * f.LOG2E
    else:
        scaled = tl.where(lse <= DEAD, float("inf"), lse * f.LOG2E)
    tl.store(l2 + at, scaled, mask=i < size_t)


@triton.jit
def row_statistics(l2, delta, correction, at, i, size_t, CHECK: tl.constexpr, SCORE: tl.constexpr):
    """logsumexp and its correction in units of log 2, and delta, of the rows i."""
    if SCORE is None:
        return i * 0.0, i * 0.0, i * 0.0
    if CHECK:
        l2_i = tl.load(l2 + at, mask=i < size_t, other=0.0)
        delta_i = tl.load(delta + at, mask=i < size_t, other=0.0)
    else:
        l2_i = tl.load(l2 + at)
        delta_i = tl.load(delta + at)
    if correction is None:
        c2 = delta_i
    else:
        c2 = tl.load(correction + at, mask=i < size_t, other=0.0)
    return l2_i, c2, delta_i


@triton.jit
def tile_gradients(
    dot, dp, l2, c2, delta, captures, sizes, seed, H, R, C, b, h, i, j, j0,
    BM: tl.constexpr, BN: tl.constexpr, TURNED: tl.constexpr, CHECK: tl.constexpr, SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    CORRECT: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """From the scores' dot products and dp = grad_out . v of a tile, (BM, BN) or TURNED (BN, BM):

    w     the weights that multiply the values
    ds    the derivative by the score, times SLOPE, zero where masked (without a softmax: dw times SLOPE)
    dw    the derivative by the weight before dropout
    prob  the normalised weight
    live  where neither the mask nor an end masks; of no meaning without CHECK
    """
    X: tl.constexpr = BN if TURNED else BM
    Y: tl.constexpr = BM if TURNED else BN
    live = dp
    if CHECK:
        live = tl.broadcast_to((i < (sizes[2] >> 1)) & (j < (sizes[3] >> 1)), [X, Y])
        if KEEP is not None:
            live = live & KEEP(captures, sizes, H, R, C, dot, dot, b, h, i, j)
    dw = dp
    if THRESHOLD is not None:
        if TURNED:
            rows = tl.reshape(tl.broadcast_to(i, [1, BM]), [BM, 1])
            kept = tl.trans(f.survives(seed, b, h, rows, j0, sizes[1] >> 1, THRESHOLD, BM, BN))
        else:
            kept = f.survives(seed, b, h, i, j0, sizes[1] >> 1, THRESHOLD, BM, BN)
        dw = tl.where(kept, dp * RESCALE, 0.0)
    prob = dot
    if SCORE is None:
        w = f.full(WEIGHT(captures, sizes, H, R, C, dot, dot, b, h, i, j), X, Y)
        ds = dw
    else:
        s = f.full(SCORE(captures, sizes, H, R, C, dot, dot, b, h, i, j), X, Y)
        if CHECK:
            s = tl.where(live, s, float("-inf"))
        if CORRECT:
            prob = tl.exp2((s * SCALE - l2) - c2)
        else:
            prob = tl.exp2(s * SCALE - l2)
        w = prob
        if WEIGHT is None:
            ds = prob * (dw - delta)
        else:
            factor = f.full(WEIGHT(captures, sizes, H, R, C, dot, dot, b, h, i, j), X, Y)
            w = prob * factor
            ds = prob * (dw * factor - delta)
    if SLOPE is not None:
        ds = ds * SLOPE(captures, sizes, H, R, C, dot, dot, b, h, i, j)
    if CHECK:
        ds = tl.where(live, ds, 0.0)
        w = tl.where(live, w, 0.0)
    if THRESHOLD is not None:
        w = tl.where(kept, w * RESCALE, 0.0)
    return w, ds, dw, prob, live


@triton.jit
def _keys_step(
    dk, dv, k_tile, v_tile, q, grad_out, l2, delta, correction, q_strides, grad_strides, captures, sizes, seed,
    H, C, b, h, i0, j, j0,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr,
    LEAF: tl.constexpr, CHECK: tl.constexpr, ROWS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr,
    WEIGHT: tl.constexpr, SLOPE: tl.constexpr, LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the gradients of the keys (BN, BD) and values (BN, BDV); with LEAF, dk is that of a load (BN,)."""
    size_t = sizes[2] >> 1
    i = i0 + tl.arange(0, BM)[None, :]
    q_tile = f.load_tile(q, q_strides, b, h, i0, size_t, BM, D, BD, CHECK)
    l2_i, c2, delta_i = row_statistics(l2, delta, correction, i, i, size_t, CHECK, SCORE)
    do = f.load_tile(grad_out, grad_strides, b, h, i0, size_t, BM, DV, BDV, CHECK)
    do = do.to(v_tile.dtype)
    R = ROWS(captures, sizes, H, b, h, i)
    dot = f.dot(k_tile, tl.trans(q_tile), None, PRECISION)
    dp = f.dot(v_tile, tl.trans(do), None, PRECISION)
    w, ds, dw, prob, live = tile_gradients(
        dot, dp, l2_i, c2, delta_i, captures, sizes, seed, H, R, C, b, h, i, j, j0, BM, BN, True, CHECK, SCALE,
        THRESHOLD, RESCALE, correction is not None, SCORE, KEEP, WEIGHT, SLOPE,
    )  # fmt: skip
    if LEAF is None:
        dv = f.dot(w.to(do.dtype), do, dv, PRECISION)
        dk = f.dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    else:
        part = leaf_part(ds, dw, prob, live, dot, captures, sizes, H, R, C, b, h, i, j, LEAF, CHECK, LEAF_SCORES,
                         LEAF_WEIGHTS)  # fmt: skip
        dk += tl.sum(part, 1)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, grad_out, l2, delta, correction, dk, dv, q_strides, k_strides, v_strides, grad_strides,
    dk_strides, dv_strides, captures, sizes, seed, walks,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, THRESHOLD: tl.constexpr,
    RESCALE: tl.constexpr, PRECISION: tl.constexpr, LEAF: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr,
    SLOPE: tl.constexpr, LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, G, B). dk (B, G, S, D) and dv (B, G, S, DV) by their strides; walks (key blocks, 4) along the
    rows, or None. FACTOR is what of d score / d dot is a number: SLOPE is the rest, or None.

    With LEAF, the number of a load, the grid is (key blocks, H, B),
    and dk is that load's gradient summed over the rows, (B, H, S) of float32; dv is not touched."""
    size_h, size_t, size_s = sizes[1] >> 1, sizes[2] >> 1, sizes[3] >> 1
    block, lead, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if LEAF is None:
        g, first_h = lead, lead * PER_GROUP
    else:
        g, first_h = lead // PER_GROUP, lead
    j0 = block * BN
    j = j0 + tl.arange(0, BN)[:, None]
    k_tile = f.load_tile(k, k_strides, b, g, j0, size_s, BN, D, BD, True)
    v_tile = f.load_tile(v, v_strides, b, g, j0, size_s, BN, DV, BDV, True)
    if THRESHOLD is not None:
        seed = tl.load(seed)
    if walks is None:  # the last block of keys may reach beyond the end: all its tiles are checked
        start, full_start, end = size_t * 0, size_t * 0, size_t
        full_end = tl.where(j0 + BN <= size_s, size_t // BM * BM, 0)
    else:
        start, full_start = tl.load(walks + 4 * block), tl.load(walks + 4 * block + 1)
        full_end, end = tl.load(walks + 4 * block + 2), tl.load(walks + 4 * block + 3)
        inside = j0 + BN <= size_s
        full_start, full_end = tl.where(inside, full_start, start), tl.where(inside, full_end, start)
    before = (full_start - start) // BM
    if LEAF is None:
        dk_acc = tl.zeros([BN, BD], tl.float32)
    else:
        dk_acc = tl.zeros([BN], tl.float32)
    dv_acc = tl.zeros([BN, BDV], tl.float32)
    for r in range(0, PER_GROUP if LEAF is None else 1):
        h = first_h + r
        H = HEADS(captures, sizes, b, h)
        C = COLUMNS(captures, sizes, H, b, h, j)
        row = (b.to(tl.int64) * size_h + h) * size_t
        l2_h, delta_h = l2 + row, delta + row
        if correction is None:
            correction_h = None
        else:
            correction_h = correction + row
        for i0 in range(full_start, full_end, BM):
            i0 = tl.multiple_of(i0, BM)
            dk_acc, dv_acc = _keys_step(
                dk_acc, dv_acc, k_tile, v_tile, q, grad_out, l2_h, delta_h, correction_h, q_strides, grad_strides,
                captures, sizes, seed, H, C, b, h, i0, j, j0, D, DV, BM, BN, BD, BDV, SCALE, THRESHOLD, RESCALE,
                PRECISION, LEAF, False, ROWS, SCORE, None, WEIGHT, SLOPE, LEAF_SCORES, LEAF_WEIGHTS,
            )  # fmt: skip
        for t in range(0, before + tl.cdiv(end - full_end, BM)):
            i0 = tl.multiple_of(tl.where(t < before, start + t * BM, full_end + (t - before) * BM), BM)
            dk_acc, dv_acc = _keys_step(
                dk_acc, dv_acc, k_tile, v_tile, q, grad_out, l2_h, delta_h, correction_h, q_strides, grad_strides,
                captures, sizes, seed, H, C, b, h, i0, j, j0, D, DV, BM, BN, BD, BDV, SCALE, THRESHOLD, RESCALE,
                PRECISION, LEAF, True, ROWS, SCORE, KEEP, WEIGHT, SLOPE, LEAF_SCORES, LEAF_WEIGHTS,
            )  # fmt: skip
    if LEAF is None:
        f.store_tile(dk, dk_strides, b, g, j0, size_s, dk_acc * FACTOR, BN, D, BD)
        f.store_tile(dv, dv_strides, b, g, j0, size_s, dv_acc, BN, DV, BDV)
    else:
        column = j0 + tl.arange(0, BN)
        tl.store(dk + (b.to(tl.int64) * size_h + first_h) * size_s + column, dk_acc, mask=column < size_s)


@triton.jit
def _rows_step(
    total, sums, q_tile, do, k, v, l2, c2, delta_i, k_strides, v_strides, captures, sizes, seed, H, R, b, h, i, j0,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    PRECISION: tl.constexpr, LEAF: tl.constexpr, CORRECT: tl.constexpr, CHECK: tl.constexpr, COLUMNS: tl.constexpr,
    SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr, SLOPE: tl.constexpr, LEAF_SCORES: tl.constexpr,
    LEAF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the gradient of the queries (BM, BD); with LEAF, to that of a load by row (BM,)."""
    size_s = sizes[3] >> 1
    j = j0 + tl.arange(0, BN)[None, :]
    k_tile = f.load_tile(k, k_strides, b, h // PER_GROUP, j0, size_s, BN, D, BD, CHECK)
    v_tile = f.load_tile(v, v_strides, b, h // PER_GROUP, j0, size_s, BN, DV, BDV, CHECK)
    C = COLUMNS(captures, sizes, H, b, h, j)
    dot = f.dot(q_tile, tl.trans(k_tile), None, PRECISION)
    dp = f.dot(do, tl.trans(v_tile), None, PRECISION)
    _w, ds, dw, prob, live = tile_gradients(
        dot, dp, l2, c2, delta_i, captures, sizes, seed, H, R, C, b, h, i, j, j0, BM, BN, False, CHECK, SCALE,
        THRESHOLD, RESCALE, CORRECT and LEAF is not None, SCORE, KEEP, WEIGHT, SLOPE,
    )  # fmt: skip
    if LEAF is None:
        total = f.dot(ds.to(k_tile.dtype), k_tile, total, PRECISION)
        if CORRECT:
            sums += tl.sum(prob, 1)
    else:
        part = leaf_part(ds, dw, prob, live, dot, captures, sizes, H, R, C, b, h, i, j, LEAF, CHECK, LEAF_SCORES,
                         LEAF_WEIGHTS)  # fmt: skip
        total += tl.sum(part, 1)
    return total, sums


@triton.jit
def leaf_part(
    ds, dw, prob, live, dot, captures, sizes, H, R, C, b, h, i, j, LEAF: tl.constexpr, CHECK: tl.constexpr,
    LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The derivative by one load, of each element of a tile."""
    by_score = LEAF_SCORES(captures, sizes, H, R, C, dot, prob, b, h, i, j)
    by_weight = LEAF_WEIGHTS(captures, sizes, H, R, C, dot, prob, b, h, i, j)
    part = ds * by_score[LEAF] + dw * by_weight[LEAF]
    if CHECK:
        part = tl.where(live, part, 0.0)
    return part


@triton.jit
def rows_kernel(
    q, k, v, grad_out, l2, delta, correction, result, q_strides, k_strides, v_strides, grad_strides,
    result_strides, captures, sizes, seed, walks,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, THRESHOLD: tl.constexpr,
    RESCALE: tl.constexpr, PRECISION: tl.constexpr, LEAF: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr,
    SLOPE: tl.constexpr, LEAF_SCORES: tl.constexpr, LEAF_WEIGHTS: tl.constexpr, EXTRAS_COUNT: tl.constexpr,
    EXTRAS: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, H, B). LEAF None: result is the queries' gradient (B, H, T, D); else that of the load of this
    number, summed over the keys, (B, H, T) of float32. Walks as in the forward kernel. Writes `correction` (B, H, T)
    unless it is None, and reads it with LEAF."""
    CORRECT: tl.constexpr = correction is not None
    size_h, size_t, size_s = sizes[1] >> 1, sizes[2] >> 1, sizes[3] >> 1
    block, h, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i0 = block * BM
    i = i0 + tl.arange(0, BM)[:, None]
    q_tile = f.load_tile(q, q_strides, b, h, i0, size_t, BM, D, BD, True)
    do = f.load_tile(grad_out, grad_strides, b, h, i0, size_t, BM, DV, BDV, True)
    do = do.to(q_tile.dtype)
    first_row = (b.to(tl.int64) * size_h + h) * size_t
    at = first_row + i
    if LEAF is None:
        l2_i, c2, delta_i = row_statistics(l2, delta, None, at, i, size_t, True, SCORE)
    else:
        l2_i, c2, delta_i = row_statistics(l2, delta, correction, at, i, size_t, True, SCORE)
    H = HEADS(captures, sizes, b, h)
    R = ROWS(captures, sizes, H, b, h, i)
    sums = tl.zeros([BM], tl.float32)
    if CORRECT and EXTRAS_COUNT > 0:
        logits = EXTRAS(captures, sizes, H, R, b, h, i)
        for x in tl.static_range(EXTRAS_COUNT):
            sums += tl.reshape(tl.exp2(f.full(logits[x], BM, 1) - l2_i), [BM])
    if THRESHOLD is not None:
        seed = tl.load(seed)
    if walks is None:
        start, full_start, end = size_s * 0, size_s * 0, size_s
        full_end = size_s // BN * BN
    else:
        start, full_start = tl.load(walks + 4 * block), tl.load(walks + 4 * block + 1)
        full_end, end = tl.load(walks + 4 * block + 2), tl.load(walks + 4 * block + 3)
    if LEAF is None:
        total = tl.zeros([BM, BD], tl.float32)
    else:
        total = tl.zeros([BM], tl.float32)
    for j0 in range(full_start, full_end, BN):
        j0 = tl.multiple_of(j0, BN)
        total, sums = _rows_step(
            total, sums, q_tile, do, k, v, l2_i, c2, delta_i, k_strides, v_strides, captures, sizes, seed, H, R, b, h,
            i, j0, D, DV, BM, BN, BD, BDV, PER_GROUP, SCALE, THRESHOLD, RESCALE, PRECISION, LEAF, CORRECT, False,
            COLUMNS, SCORE, None, WEIGHT, SLOPE, LEAF_SCORES, LEAF_WEIGHTS,
        )  # fmt: skip
    before = (full_start - start) // BN
    for n in range(0, before + tl.cdiv(end - full_end, BN)):
        j0 = tl.multiple_of(tl.where(n < before, start + n * BN, full_end + (n - before) * BN), BN)
        total, sums = _rows_step(
            total, sums, q_tile, do, k, v, l2_i, c2, delta_i, k_strides, v_strides, captures, sizes, seed, H, R, b, h,
            i, j0, D, DV, BM, BN, BD, BDV, PER_GROUP, SCALE, THRESHOLD, RESCALE, PRECISION, LEAF, CORRECT, True,
            COLUMNS, SCORE, KEEP, WEIGHT, SLOPE, LEAF_SCORES, LEAF_WEIGHTS,
        )  # fmt: skip
    if LEAF is None:
        if CORRECT:
            known = sums > 0.0
            total = total / tl.where(known, sums, 1.0)[:, None]
            c2 = tl.where(known, tl.log2(sums), 0.0)
            row = i0 + tl.arange(0, BM)
            tl.store(correction + first_row + row, c2, mask=row < size_t)
        f.store_tile(result, result_strides, b, h, i0, size_t, total * FACTOR, BM, D, BD)
    else:
        row = i0 + tl.arange(0, BM)
        tl.store(result + first_row + row, total, mask=row < size_t)
