"""The forward kernel: online softmax in units of log 2, with one program per block of rows and head."""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f
from attnfx.mask.additive import LOST

# Below every relevant score, yet finite: a row with only -inf so far needs no special case, its l_i is 0.
LOWEST = tl.constexpr(-3.0e38)
LARGEST_LOST = tl.constexpr(LOST * 1.4426950408889634)  # upper bound of the scores in a row without a live key


@triton.jit
def exp(x, NATURAL: tl.constexpr):
    """Compute exp of a difference of scores, given in natural units or in units of log 2."""
    return tl.exp2(x * f.LOG2E if NATURAL else x)


@triton.jit
def finite(m, NATURAL: tl.constexpr):
    """Make a maximum safe to subtract: with NATURAL it may be -inf, otherwise LOWEST keeps it finite."""
    return tl.where(m == float("-inf"), 0.0, m) if NATURAL else m


@triton.jit
def extra_logits(m_i, l_i, logits, here, COUNT: tl.constexpr, BM: tl.constexpr):
    """Add COUNT logits without a value to the softmax, where `here` holds."""
    for e in tl.static_range(COUNT):  # type: ignore[misc]
        logit = tl.reshape(f.full(logits[e], BM, 1), [BM])
        if here is not None:
            logit = tl.where(here, logit, float("-inf"))
        m_new = tl.maximum(m_i, logit)
        l_i = l_i * tl.exp2(m_i - m_new) + tl.exp2(logit - m_new)
        m_i = m_new
    return m_i, l_i


@triton.jit
def step(
    acc, m_i, l_i, q, k, v, k_strides, v_strides, captures, sizes, seed, H, R, b, h, g, i0, i, j0, some,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr, CHECK: tl.constexpr, NATURAL: tl.constexpr,
    COLUMNS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Process one tile: BM rows and keys j0 .. j0 + BN. KEEP None: unmasked. CHECK: it may reach past the last key.

    With NATURAL, SCORE is in natural units. `some` (BM,) selects the rows that take part, None all; it needs CHECK.
    The rows i may be any, of any heads h of the group g, if i0 is None."""
    size_s = sizes[3] >> 1
    key = f.indices(j0, BN, True)
    j = f.clamped(key, size_s) if CHECK else key
    k_tile = f.load_tile(k, k_strides, b, g, j0, size_s, BN, D, BD, CHECK)
    dot = f.dot(q, tl.trans(k_tile), None, PRECISION)
    C = COLUMNS(captures, sizes, H, b, h, j)
    if SCORE is None:  # without a softmax, each weight depends on its own score alone
        p = f.full(WEIGHT(captures, sizes, H, R, C, dot, dot, b, h, i, j), BM, BN)
        if KEEP is not None:
            p = tl.where(KEEP(captures, sizes, H, R, C, dot, dot, b, h, i, j), p, 0.0)
        if CHECK:
            p = tl.where(key < size_s, p, 0.0)
    else:
        s = f.full(SCORE(captures, sizes, H, R, C, dot, dot, b, h, i, j), BM, BN)
        if KEEP is not None:
            s = tl.where(KEEP(captures, sizes, H, R, C, dot, dot, b, h, i, j), s, float("-inf"))
        if some is not None:
            s = tl.where(some[:, None] & (key < size_s), s, float("-inf"))
        elif CHECK:
            s = tl.where(key < size_s, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * SCALE)
        m_safe = finite(m_new, NATURAL)
        p = exp(s * SCALE - m_safe[:, None], NATURAL)
        alpha = exp(m_i - m_safe, NATURAL)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        m_i = m_new
        if WEIGHT is not None:
            p = p * WEIGHT(captures, sizes, H, R, C, dot, dot, b, h, i, j)
    if THRESHOLD is not None:
        if i0 is None:
            kept = f.survives_each(seed, b * (sizes[1] >> 1) + h, i, j, THRESHOLD, BM, BN)
        else:
            kept = f.survives(seed, b, h, i0, j0, sizes[1] >> 1, THRESHOLD, BM, BN, False)
        p = tl.where(kept, p, 0.0)
    v_tile = f.load_tile(v, v_strides, b, g, j0, size_s, BN, DV, BDV, CHECK)
    acc = f.dot(p.to(v_tile.dtype), v_tile, acc, PRECISION)
    return acc, m_i, l_i


@triton.jit
def forward_kernel(
    q, k, v, out, logsumexp, q_strides, k_strides, v_strides, out_strides, captures, sizes, seed, walks, order,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, SAFE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    PRECISION: tl.constexpr, EXTRAS_COUNT: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr,
    WHOLE: tl.constexpr, WEIGHT: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """Compute out (B, H, T, DV) and logsumexp (B, H, T) from q (B, H, T, D), k (B, G, S, D) and v (B, G, S, DV).

    Grid (row blocks, H, B). Tensors are passed with their strides; logsumexp is contiguous. k and v may be descriptors,
    with None as strides. walks and order come from `walks.walks_of`, or are None without a mask.

    THRESHOLD is dropout's 32-bit threshold, or None; RESCALE is 1 / (1 - dropout). A function that is None is unused.
    """
    size_h, size_t, size_s = sizes[1] >> 1, sizes[2] >> 1, sizes[3] >> 1
    block, h, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i0 = block * BM
    m = tl.arange(0, BM)
    i = f.clamped(f.indices(i0, BM, False), size_t)
    q_tile = f.load_tile(q, q_strides, b, h, i0, size_t, BM, D, BD, True)
    H = HEADS(captures, sizes, b, h)
    R = ROWS(captures, sizes, H, b, h, i)
    if THRESHOLD is not None:
        seed = tl.load(seed)
    m_i = tl.full([BM], LOWEST, tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    if EXTRAS_COUNT > 0:
        m_i, l_i = extra_logits(m_i, l_i, EXTRAS(captures, sizes, H, R, b, h, i), None, EXTRAS_COUNT, BM)
    STEP: tl.constexpr = BN if order is None else 1
    place, start, full_start, full_end, end = f.walk(walks, b, h, block, size_s, BN)
    for n in range(full_start, full_end, STEP):
        j0 = f.tile_at(order, place, n, BN)
        acc, m_i, l_i = step(
            acc, m_i, l_i, q_tile, k, v, k_strides, v_strides, captures, sizes, seed, H, R, b, h, h // PER_GROUP, i0, i,
            j0, None, D, DV, BM, BN, BD, BDV, SCALE, THRESHOLD, PRECISION, False, False, COLUMNS, SCORE, None, WEIGHT,
        )  # fmt: skip
    before = (full_start - start) // STEP
    for n in range(0, before + tl.cdiv(end - full_end, STEP)):
        t = tl.where(n < before, start + n * STEP, full_end + (n - before) * STEP)
        j0 = f.tile_at(order, place, t, BN)
        acc, m_i, l_i = step(
            acc, m_i, l_i, q_tile, k, v, k_strides, v_strides, captures, sizes, seed, H, R, b, h, h // PER_GROUP, i0, i,
            j0, None, D, DV, BM, BN, BD, BDV, SCALE, THRESHOLD, PRECISION, True, False, COLUMNS, SCORE, KEEP, WEIGHT,
        )  # fmt: skip
    at = (b.to(tl.int64) * size_h + h) * size_t + i0 + m
    if SCORE is None:
        tl.store(logsumexp + at, tl.zeros([BM], tl.float32), mask=i0 + m < size_t)
    else:
        if WHOLE is None:
            lse = (m_i + tl.log2(l_i)) * f.LN2
        elif tl.max(tl.where((m_i <= LARGEST_LOST) & (i0 + m < size_t), 1, 0)) > 0:
            # Recompute the rows without a live key over all keys, masked scores included. In natural units, float32's
            # lowest value as a fill stays finite. The other rows see only -inf, which leaves them unchanged.
            dead = m_i <= LARGEST_LOST
            m_w = tl.where(dead, float("-inf"), m_i * f.LN2)
            l_i, acc = tl.where(dead, 0.0, l_i), tl.where(dead[:, None], 0.0, acc)
            for j0 in range(0, size_s, BN):
                acc, m_w, l_i = step(
                    acc, m_w, l_i, q_tile, k, v, k_strides, v_strides, captures, sizes, seed, H, R, b, h,
                    h // PER_GROUP, i0, i, j0, dead, D, DV, BM, BN, BD, BDV, 1.0, THRESHOLD, PRECISION, True, True,
                    COLUMNS, WHOLE, None, WEIGHT,
                )  # fmt: skip
            lse = m_w + tl.log(l_i)
        else:
            lse = (m_i + tl.log2(l_i)) * f.LN2
        tl.store(logsumexp + at, lse, mask=i0 + m < size_t)
        if SAFE:
            l_i = tl.where(l_i == 0.0, 1.0, l_i)
        acc = acc / l_i[:, None]
    acc = acc * RESCALE
    f.store_tile(out, out_strides, b, h, i0, size_t, acc, BM, DV, BDV)
