"""Functions that generated programs call and Triton's core lacks, from operations that its interpreter has as well."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Of Philox4x32 (Salmon et al. 2011). Its authors know of no flaw from 8 rounds on; with 7, a test longer than those of
# BigCrush gave them suspicious p-values (philox.h of their library, Random123). A draw here decides which weights are
# dropped, no more; tests/kernels/flash/test_draws.py looks for bias and correlation there.
ROUNDS = tl.constexpr(7)


@triton.jit
def full(x, BM: tl.constexpr, BN: tl.constexpr):
    """A float value of a program as a whole tile."""
    return tl.broadcast_to(tl.cast(x, tl.float32), [BM, BN])


@triton.jit
def indices(first, N: tl.constexpr, ACROSS: tl.constexpr):
    """N rows or keys of a tile, (N, 1), or ACROSS (1, N)."""
    n = tl.arange(0, N)
    if ACROSS:
        n = n[None, :]
    else:
        n = n[:, None]
    return first + n


@triton.jit
def clamped(x, length):
    """The rows or keys x of a tile, (1, n) or (n, 1), as indices that a program may load by: 0 where they are not below
    the length, as nothing is made of those.

    Triton is told that they still run on: 16 bytes are then loaded at once, and at the end of a row that may be some
    beyond it. They share an aligned block of 16 bytes with one that is there, so that their memory can be read.
    """
    inside = tl.where(x < length, x, 0)
    if x.shape[0] == 1:
        inside = tl.multiple_of(tl.max_contiguous(inside, [1, x.shape[1]]), [1, x.shape[1]])
    else:
        inside = tl.multiple_of(tl.max_contiguous(inside, [x.shape[0], 1]), [x.shape[0], 1])
    return inside


@triton.jit
def walk_at(walks, b, h, block):
    """Which walk is a block's: walks is (numbers, 2 n + 1 with the distance n between batches, the same of heads)."""
    return tl.cast(b, tl.int64) * (walks[1] >> 1) + h * (walks[2] >> 1) + block


@triton.jit
def walk(walks, at):
    """[start, full_start, full_end, end] of one walk; they count tiles where there is a list of them, `order`."""
    ends = walks[0] + 4 * at
    return tl.load(ends), tl.load(ends + 1), tl.load(ends + 2), tl.load(ends + 3)


@triton.jit
def tile_at(order, at, n, STEP: tl.constexpr):
    """The first index of the n-th tile of a list, which is (lists, 2 n + 1 with their length n); without one, n itself
    is that index."""
    if order is None:
        first = n
    else:
        first = tl.load(order[0] + at * (order[1] >> 1) + n)
    return tl.multiple_of(first, STEP)


@triton.jit
def load_checked(base, rows, dims, stride_row, stride_dim, length, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                 CHECK: tl.constexpr):  # fmt: skip
    """base[rows, dims], zero outside. `dims` is checked where the tile is wider than WIDTH, `rows` with CHECK."""
    # unsigned, an offset needs no register for its upper half
    at = base + (rows * stride_row + dims * stride_dim).to(tl.uint32)
    if CHECK:
        if WIDTH == PADDED:
            return tl.load(at, mask=rows < length, other=0.0)
        return tl.load(at, mask=(rows < length) & (dims < WIDTH), other=0.0)
    if WIDTH == PADDED:
        return tl.load(at)
    return tl.load(at, mask=dims < WIDTH, other=0.0)


@triton.jit
def load_tile(x, strides, b, h, first, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
              CHECK: tl.constexpr):  # fmt: skip
    """(ROWS, PADDED) of one head of x (B, H, length, WIDTH), from row `first`. Without strides, x is a descriptor of
    blocks (1, 1, ROWS, PADDED)."""
    if strides is None:
        tile = tl.reshape(x.load([b, h, tl.cast(first, tl.int32), 0]), [ROWS, PADDED])
    else:
        base = x + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
        base += tl.cast(first, tl.int64) * strides[2]
        n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
        tile = load_checked(base, n, d, strides[2], strides[3], length - first, WIDTH, PADDED, CHECK)
    return tile


@triton.jit
def store_tile(x, strides, b, h, first, length, values, ROWS: tl.constexpr, WIDTH: tl.constexpr,
               PADDED: tl.constexpr):  # fmt: skip
    """The inverse of `load_tile`, by pointer."""
    base = x + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    base += tl.cast(first, tl.int64) * strides[2]
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    tl.store(base + n * strides[2] + d * strides[3], values.to(x.dtype.element_ty),
             mask=(n < length - first) & (d < WIDTH))  # fmt: skip


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x @ y in float32; acc may be None. "widened" is "ieee" in Triton's interpreter, whose product of bfloat16
    multiplies their bits."""
    if PRECISION == "widened":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def to_product(dot, x):
    """dot + x, where dot is a product of matrices that Triton would else start from x: x were waited for before it, and
    each of its steps were rounded at the size of x."""
    return tl.fma(dot, 1.0, x)


@triton.jit
def floordiv(x, y):
    """Rounds to minus infinity; the hardware's division truncates."""
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
    """Within some 1e-7 of its value: near zero, where 1 - 2 / (e^2x + 1) would cancel, a polynomial of degree 9."""
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
    """The arguments above tan(pi / 8) are turned to smaller ones (Cephes' atanf)."""
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
    """Rounds to the nearest integer, ties to even."""
    low = tl.floor(x)
    rest = x - low
    odd = low - 2.0 * tl.floor(low * 0.5) == 1.0
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1.0, low)


@triton.jit
def sign(x):
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def power(x, y):
    """x ** y as eager has it: negative bases have powers of integers alone."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = whole & (y - 2.0 * tl.floor(y * 0.5) == 1.0)
    signed = tl.where(odd, -size, size)
    found = tl.where(x < 0.0, tl.where(whole, signed, float("nan")), size)
    return tl.where(y == 0.0, 1.0, found)


@triton.jit
def survives(seed, b, h, i0, j0, size_h, THRESHOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             TURNED: tl.constexpr):  # fmt: skip
    """Which weights of the rows from i0 and the keys from j0 dropout keeps, (BM, BN) or TURNED (BN, BM) of bool; i0 and
    j0 divisible by 16.

    One draw of four 32-bit numbers decides the rows i and i + 8 at the keys j and j + 8, whatever the tile: a thread
    holds just these four elements of a matrix instruction's result, and so no number is moved to another thread.
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
    """As `survives` of any rows (BM, 1) of the heads b * H + h (BM, 1) and keys (1, BN), at a draw for each."""
    zero = tl.zeros([BM, BN], tl.int32)
    column, row = zero + (j // 16 * 8 + j % 8), zero + (i // 16 * 8 + i % 8)
    r0, r1, r2, r3 = tl.philox(seed, column, row, zero + head, zero, ROUNDS)
    right, low = j // 8 % 2 == 1, i // 8 % 2 == 1
    bits = tl.where(low, tl.where(right, r3, r2), tl.where(right, r1, r0))
    return bits.to(tl.uint32, bitcast=True) >= THRESHOLD
