"""The decode kernels, for few queries and many keys: one splits the keys among programs, one combines the results.

The rows of a tile are the queries of all heads in a group: row r is head r // T of the group, query r % T.
"""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f
from attnfx.kernels.flash.triton.forward import LOWEST, exp, extra_logits, finite, step


@triton.jit
def decode_kernel(
    q, k, v, acc_out, m_out, l_out, q_strides, k_strides, v_strides, captures, sizes, seed, first, end, gap, chunk,
    walks, order,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
    PRECISION: tl.constexpr, NATURAL: tl.constexpr, EXTRAS_COUNT: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, WEIGHT: tl.constexpr,
    EXTRAS: tl.constexpr,
):  # fmt: skip
    """Compute each split's acc (B, G, splits, BM, BDV), largest score m and sum l (B, G, splits, BM), all float32.

    Grid (splits, G, B). The splits divide the keys from `first`, a multiple of BN, to `end`, `chunk` keys each, a
    multiple of BN. They skip the whole tiles of a gap, (first, length) or None. `end` and the gap encode n as 2 n + 1.
    If `walks` and `order` (see `walks.over_splits`) have a list of tiles for each group, the splits divide it evenly
    instead. With NATURAL, SCORE is in natural units and includes fills, and there must not be a KEEP."""
    size_h, size_t = sizes[1] >> 1, sizes[2] >> 1
    split, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = tl.arange(0, BM)[:, None]
    h, i = g * PER_GROUP + r // size_t, r % size_t
    h = tl.minimum(h, size_h - 1)
    exists = r < PER_GROUP * size_t
    d = tl.arange(0, BD)[None, :]
    base = q + b.to(tl.int64) * q_strides[0]
    at = h.to(tl.int64) * q_strides[1] + i.to(tl.int64) * q_strides[2] + d * q_strides[3]
    q_tile = tl.load(base + at, mask=exists & (d < D), other=0.0)
    H = HEADS(captures, sizes, b, h)
    R = ROWS(captures, sizes, H, b, h, i)
    if THRESHOLD is not None:
        seed = tl.load(seed)
    m_i = tl.full([BM], float("-inf") if NATURAL else LOWEST, tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    if EXTRAS_COUNT > 0:  # the logits without a value belong to the first split
        logits = EXTRAS(captures, sizes, H, R, b, h, i)
        m_i, l_i = extra_logits(m_i, l_i, logits, split == 0, EXTRAS_COUNT, BM)
    STEP: tl.constexpr = BN if order is None else 1
    if order is None:
        place = 0
        last = end >> 1
        if gap is not None:
            last -= gap[1] >> 1
        low = first + split * chunk
        high = tl.minimum(low + chunk, last)
    else:
        place, _start, _full_start, _full_end, listed = f.walk(walks, b, g, 0, sizes[3] >> 1, BN)
        share = tl.cdiv(listed, tl.num_programs(0))
        low = split * share
        high = tl.minimum(low + share, listed)
    for n in range(low, high, STEP):
        j0 = f.tile_at(order, place, n, BN)
        if gap is not None:
            j0 = tl.multiple_of(j0 + tl.where(j0 < (gap[0] >> 1), 0, gap[1] >> 1), BN)
        acc, m_i, l_i = step(
            acc, m_i, l_i, q_tile, k, v, k_strides, v_strides, captures, sizes, seed, H, R, b, h, g, None, i, j0, None,
            D, DV, BM, BN, BD, BDV, SCALE, THRESHOLD, PRECISION, True, NATURAL, COLUMNS, SCORE, KEEP, WEIGHT,
        )  # fmt: skip
    row = ((b.to(tl.int64) * tl.num_programs(1) + g) * tl.num_programs(0) + split) * BM
    tl.store(acc_out + (row + r) * BDV + tl.arange(0, BDV)[None, :], acc)
    tl.store(m_out + row + tl.arange(0, BM), m_i)
    tl.store(l_out + row + tl.arange(0, BM), l_i)


@triton.jit
def combine_kernel(
    acc_in, m_in, l_in, out, logsumexp, out_strides, sizes, splits,
    DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr, BS: tl.constexpr, PER_GROUP: tl.constexpr,
    SAFE: tl.constexpr, RESCALE: tl.constexpr, NATURAL: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Combine one row of all splits (at most BS) into out and logsumexp. Grid (T * heads of a group, G, B)."""
    size_h, size_t = sizes[1] >> 1, sizes[2] >> 1
    r, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, i = g * PER_GROUP + r // size_t, r % size_t
    splits = splits >> 1
    n = tl.arange(0, BS)
    rows = ((b * tl.num_programs(1) + g) * splits + n) * BM + r
    e = tl.arange(0, BDV)
    acc = tl.load(acc_in + rows[:, None] * BDV + e[None, :], mask=(n < splits)[:, None], other=0.0)
    lse = 0.0
    if SOFTMAX:
        m_n = tl.load(m_in + rows, mask=n < splits, other=float("-inf"))
        l_n = tl.load(l_in + rows, mask=n < splits, other=0.0)
        m = tl.max(m_n, 0)
        share = exp(m_n - finite(m, NATURAL), NATURAL)
        total = tl.sum(l_n * share, 0)
        if NATURAL:
            lse = m + tl.log(total)
        else:
            lse = (m + tl.log2(total)) * f.LN2
        if SAFE:
            total = tl.where(total == 0.0, 1.0, total)
        result = tl.sum(acc * share[:, None], 0) / total
    else:
        result = tl.sum(acc, 0)
    tl.store(logsumexp + (b * size_h + h) * size_t + i, lse)
    place = out + b * out_strides[0] + h.to(tl.int64) * out_strides[1] + i.to(tl.int64) * out_strides[2]
    tl.store(place + e * out_strides[3], (result * RESCALE).to(out.dtype.element_ty), mask=e < DV)
