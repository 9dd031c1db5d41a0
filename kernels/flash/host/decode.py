"""Run the decode tier: split the keys of a call and launch its two kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host.fallback import first_that_runs
from attnfx.kernels.flash.host.forward import Arguments, padded, tiled
from attnfx.kernels.flash.host.launch import Launch
from attnfx.kernels.flash.host.tiles import Tile, decode_tiles
from attnfx.kernels.flash.host.walks import over_splits
from attnfx.kernels.flash.triton.decode import combine_kernel, decode_kernel
from attnfx.kernels.gpu import capability

MOST_ROWS = 64  # queries times heads of a group; with more, the forward kernel fills the GPU
MOST_SPLITS = 64
WAVES = 2  # programs per multiprocessor


def supports(call: Call) -> str | None:
    """Return why these kernels cannot run the call, as one sentence, or None."""
    per_group = call.query.shape[1] // max(call.key.shape[1], 1)
    if call.query.shape[2] * per_group > MOST_ROWS:
        return f"{call.query.shape[2]} queries of {per_group} heads per key head are more than {MOST_ROWS} rows"
    return launch.supports(call)


def splits_of(keys: int, heads: int, tile: Tile, processors: int, wanted: int = 0) -> tuple[int, int]:
    """Return (splits, keys of each): `wanted` splits, or enough to occupy every multiprocessor. Each split has keys."""
    tiles = -(-keys // tile.keys)
    wanted = max(1, min(MOST_SPLITS, wanted or -(-WAVES * processors // max(heads, 1)), tiles))
    chunk = -(-tiles // wanted) * tile.keys
    return -(-keys // chunk), chunk


def forward(
    call: Call,
    tile: Tile | None = None,
    processors: int | None = None,
    chosen: Tile | None = None,
    wanted: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute out (B, H, T, Dv) in the spec's dtype and logsumexp (B, H, T) in float32.

    logsumexp is a natural logarithm, and zero without a softmax. If given, `tile` is the only tile tried; `chosen` is
    tried before the table's. `wanted` is the number of splits, 0 for the default. Raise CannotLaunch if none of the
    tiles compiles and fits the device.
    """
    query = call.query
    out, logsumexp = call.outputs()
    width = max(padded(query.shape[3]), padded(call.value.shape[3]))
    tiles = [tile] if tile is not None else decode_tiles(query.device, query.dtype, width, chosen)

    def run(tile: Tile) -> None:
        for made in launches(call, out, logsumexp, tile, processors, wanted=wanted):
            made.run(query.device)

    first_that_runs("decode", call, tiles, run, chosen)
    return out, logsumexp


def launches(
    call: Call,
    out: Tensor,
    logsumexp: Tensor,
    tile: Tile,
    processors: int | None = None,
    target: int | None = None,
    wanted: int = 0,
) -> tuple[Launch, Launch]:
    """Create the launches of the kernel over the splits and of the kernel that combines them."""
    some, query = Arguments(call), call.query
    target = capability(query.device) if target is None else target
    batch, heads, rows, _ = query.shape
    groups = call.key.shape[1]
    packed = rows * (heads // groups)
    tile = tile._replace(rows=max(16, 1 << (packed - 1).bit_length()))
    if processors is None:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count if target else 4
    # if a row may lack a live key, masked scores take part in the softmax like any other score
    natural = some.dead_rows_average()
    shared = over_splits(call, some.program.keep, tile, natural)
    low, high = shared.gap or (0, 0)
    keys = shared.end - shared.first - (high - low)
    splits, chunk = splits_of(max(keys, 1), batch * groups, tile, processors, wanted)
    constants = some.constants() | dict(BM=tile.rows)
    if natural:
        constants |= dict(SCORE=some.functions["whole"], KEEP=None, SCALE=1.0)
    shape = (batch, groups, splits, tile.rows)
    acc = query.new_empty((*shape, padded(call.value.shape[3])), dtype=torch.float32)
    m, total = query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)
    decoded = Launch(
        decode_kernel,
        (splits, groups, batch),
        dict(
            q=query, acc_out=acc, m_out=m, l_out=total, q_strides=query.stride(), captures=some.captures,
            sizes=some.encoded, seed=call.seed, first=shared.first, end=2 * shared.end + 1, chunk=chunk,
            gap=None if shared.gap is None else (2 * low + 1, 2 * (high - low) + 1),
            walks=shared.listed.walks, order=shared.listed.order,
            **tiled("k:k v:v", (call.key, call.value), tile.keys, target),
        ),
        constants
        | dict(
            BN=tile.keys, NATURAL=natural, EXTRAS=some.functions["extras"], EXTRAS_COUNT=len(some.program.extras),
        ),
        tile,
        shared.listed.before,
    )  # fmt: skip
    combined = Launch(
        combine_kernel,
        (packed, groups, batch),
        dict(
            acc_in=acc, m_in=m, l_in=total, out=out, logsumexp=logsumexp, out_strides=out.stride(), sizes=some.encoded,
            splits=2 * splits + 1,
        ),
        dict(
            DV=constants["DV"], BM=tile.rows, BDV=constants["BDV"], BS=1 << (splits - 1).bit_length(),
            PER_GROUP=constants["PER_GROUP"], SAFE=call.spec.safe, RESCALE=constants["RESCALE"], NATURAL=natural,
            SOFTMAX=some.program.softmax,
        ),
        Tile(1, 0, 4, 1),
    )  # fmt: skip
    return decoded, combined
