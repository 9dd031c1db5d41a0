"""Functions for generated programs and kernels that Triton lacks, built from operations its interpreter supports."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Rounds of Philox4x32 (Salmon et al. 2011). From 8 rounds on, its authors do not know any flaw; with 7, a test longer
# than BigCrush gave them suspicious p-values (philox.h of their library, Random123). The random bits here only decide
# which weights are dropped; tests/kernels/flash/test_draws.py checks them for bias and correlation.
ROUNDS = tl.constexpr(7)


@triton.jit
def full(x, BM: tl.constexpr, BN: tl.constexpr):
    """Broadcast a float value of a program to a whole tile."""
    return tl.broadcast_to(tl.cast(x, tl.float32), [BM, BN])


@triton.jit
def indices(first, N: tl.constexpr, ACROSS: tl.constexpr):
    """Return the indices of N rows or keys of a tile, (N, 1), or with ACROSS (1, N)."""
    n = tl.arange(0, N)
    return first + (n[None, :] if ACROSS else n[:, None])


@triton.jit
def clamped(x, length):
    """Make the rows or keys x of a tile, (1, n) or (n, 1), safe to load by: an index outside becomes 0.

    The results at such indices are discarded. Triton is still told that the indices are contiguous, so that it loads 16
    bytes at once. At the end of a row, such a load may reach past the end. This is safe, because the bytes past the end
    share an aligned block of 16 bytes with an existing element.
    """
    inside = tl.where(x < length, x, 0)
    return tl.multiple_of(tl.max_contiguous(inside, [x.shape[0], x.shape[1]]), [x.shape[0], x.shape[1]])


@triton.jit
def walk(walks, b, h, block, length, STEP: tl.constexpr):
    """Return the number of a block's walk, then its [start, full_start, full_end, end], which count tiles if the kernel
    has a list, `order`. walks is (pointer, 2 n + 1 for the stride n of batches, same for heads). Without walks, all
    `length` indices are visited, in steps of STEP."""
    if walks is None:
        at, start, full_start, end = 0, length * 0, length * 0, length
        full_end = length // STEP * STEP
    else:
        at = tl.cast(b, tl.int64) * (walks[1] >> 1) + h * (walks[2] >> 1) + block
        ends = walks[0] + 4 * at
        start, full_start, full_end, end = tl.load(ends), tl.load(ends + 1), tl.load(ends + 2), tl.load(ends + 3)
    return at, start, full_start, full_end, end


@triton.jit
def tile_at(order, at, n, STEP: tl.constexpr):
    """Return the first index of the n-th tile of a list. order is (pointer, 2 m + 1 for the length m of a list).
    Without a list, n itself is the index."""
    first = n if order is None else tl.load(order[0] + at * (order[1] >> 1) + n)
    return tl.multiple_of(first, STEP)


@triton.jit
def load_tile(x, strides, b, h, first, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
              CHECK: tl.constexpr):  # fmt: skip
    """Load (ROWS, PADDED) of one head of x (B, H, length, WIDTH), from row `first`, zero outside. Check the last dim if
    the tile is wider than WIDTH, and the rows with CHECK. Without strides, x is a descriptor with blocks (1, 1, ROWS,
    PADDED)."""
    if strides is None:
        tile = tl.reshape(x.load([b, h, tl.cast(first, tl.int32), 0]), [ROWS, PADDED])
    else:
        base = x + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
        base += tl.cast(first, tl.int64) * strides[2]
        n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
        left = length - first
        # an unsigned offset saves the register for its upper half
        at = base + (n * strides[2] + d * strides[3]).to(tl.uint32)
        if CHECK and WIDTH == PADDED:
            tile = tl.load(at, mask=n < left, other=0.0)
        elif CHECK:
            tile = tl.load(at, mask=(n < left) & (d < WIDTH), other=0.0)
        elif WIDTH == PADDED:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=d < WIDTH, other=0.0)
    return tile


@triton.jit
def store_tile(x, strides, b, h, first, length, values, ROWS: tl.constexpr, WIDTH: tl.constexpr,
               PADDED: tl.constexpr):  # fmt: skip
    """Store a tile, the inverse of `load_tile` with strides."""
    base = x + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    base += tl.cast(first, tl.int64) * strides[2]
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    tl.store(base + n * strides[2] + d * strides[3], values.to(x.dtype.element_ty),
             mask=(n < length - first) & (d < WIDTH))  # fmt: skip


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """Compute acc + x @ y in float32; acc may be None. PRECISION "widened" is "ieee" for Triton's interpreter, which
    multiplies the bit patterns of bfloat16 operands."""
    if PRECISION == "widened":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def to_product(dot, x):
    """Compute dot + x after the matrix product dot. Otherwise Triton would use x as the product's initial accumulator.
    The product would then wait for x, and each of its steps would round at the magnitude of x."""
    return tl.fma(dot, 1.0, x)


@triton.jit
def floordiv(x, y):
    """Divide integers, rounding toward minus infinity; the hardware's division truncates."""
    q = x // y
    r = x - q * y
    return q - ((r != 0) & ((r < 0) != (y < 0))).to(tl.int32)


@triton.jit
def floormod(x, y):
    return x - floordiv(x, y) * y


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def tanh(x):
    """Compute tanh within about 1e-7. Near zero, use a polynomial of degree 9, because 1 - 2 / (e^2x + 1) cancels."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    s = x * x
    near = x + x * s * (-0.33333333 + s * (0.13333333 + s * (-0.05396825 + s * 0.02186949)))
    return tl.where(s < 0.04, near, far)


@triton.jit
def expm1(x):
    near = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * 0.0083333333))))
    return tl.where(tl.abs(x) < 0.05, near, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def log1p(x):
    s = x / (2.0 + x)  # log1p(x) = 2 artanh(x / (2 + x))
    t = s * s
    near = 2.0 * s * (1.0 + t * (0.33333333 + t * (0.2 + t * 0.14285714)))
    return tl.where(tl.abs(x) < 0.3, near, tl.log(1.0 + x))


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, log1p(tl.exp2(x * LOG2E)))


@triton.jit
def atan(x):
    """Compute atan as Cephes' atanf does, which maps arguments above tan(pi / 8) to smaller ones."""
    a = tl.abs(x)
    big, middle = a > 2.414213562373095, a > 0.4142135623730950
    turned = tl.where(big, -1.0 / a, tl.where(middle, (a - 1.0) / (a + 1.0), a))
    start = tl.where(big, 1.5707963267948966, tl.where(middle, 0.7853981633974483, 0.0))
    s = turned * turned
    series = ((8.05374449538e-2 * s - 1.38776856032e-1) * s + 1.99777106478e-1) * s - 3.33329491539e-1
    found = start + (series * s * turned + turned)
    return tl.where(x < 0.0, -found, found)


@triton.jit
def trunc(x):
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def nearest(x):
    """Round to the nearest integer, ties to even."""
    low = tl.floor(x)
    rest = x - low
    odd = low - 2.0 * tl.floor(low * 0.5) == 1.0
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1.0, low)


@triton.jit
def sign(x):
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def power(x, y):
    """Compute x ** y as eager does: a negative base gives NaN unless y is an integer."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = whole & (y - 2.0 * tl.floor(y * 0.5) == 1.0)
    signed = tl.where(odd, -size, size)
    found = tl.where(x < 0.0, tl.where(whole, signed, float("nan")), size)
    return tl.where(y == 0.0, 1.0, found)


@triton.jit
def survives(seed, b, h, i0, j0, size_h, THRESHOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             TURNED: tl.constexpr):  # fmt: skip
    """Return which weights dropout keeps, for rows from i0 and keys from j0: bool (BM, BN), or TURNED (BN, BM).

    i0 and j0 must be divisible by 16. One Philox call returns four 32-bit words, which decide rows i and i + 8 at keys
    j and j + 8, for any tile. A thread holds exactly these four elements of a matrix instruction's result, so the words
    never move between threads.
    """
    zero = tl.zeros([BM // 2, BN // 2], tl.int32)
    column, row = zero + (j0 // 2 + tl.arange(0, BN // 2)[None, :]), zero + (i0 // 2 + tl.arange(0, BM // 2)[:, None])
    r0, r1, r2, r3 = tl.philox(seed, column, row, zero + (b * size_h + h), zero, ROUNDS)
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [BM // 16, 8, BN // 16, 8, 2, 2])
    if TURNED:
        bits = tl.reshape(tl.permute(words, (2, 5, 3, 0, 4, 1)), [BN, BM])
    else:
        bits = tl.reshape(tl.permute(words, (0, 4, 1, 2, 5, 3)), [BM, BN])
    return bits.to(tl.uint32, bitcast=True) >= THRESHOLD


@triton.jit
def survives_each(seed, head, i, j, THRESHOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Return the same as `survives` for any rows (BM, 1), heads b * H + h (BM, 1) and keys (1, BN). This takes one
    Philox call per weight."""
    zero = tl.zeros([BM, BN], tl.int32)
    column, row = zero + (j // 16 * 8 + j % 8), zero + (i // 16 * 8 + i % 8)
    r0, r1, r2, r3 = tl.philox(seed, column, row, zero + head, zero, ROUNDS)
    right, low = j // 8 % 2 == 1, i // 8 % 2 == 1
    bits = tl.where(low, tl.where(right, r3, r2), tl.where(right, r1, r0))
    return bits.to(tl.uint32, bitcast=True) >= THRESHOLD
