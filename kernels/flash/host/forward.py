"""Convert a call to kernel arguments (tiles, pointers with strides, generated functions); run the forward kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnfx.ir.expr import Expr, walk
from attnfx.kernels.call import Call
from attnfx.kernels.evaluate import Axis, Evaluator
from attnfx.kernels.flash.codegen import import_source as module
from attnfx.kernels.flash.codegen.emit import emit
from attnfx.kernels.flash.codegen.expressions import NotEmitted
from attnfx.kernels.flash.codegen.program import Program, Table, Unsupported, program_of
from attnfx.kernels.flash.host.fallback import first_that_runs
from attnfx.kernels.flash.host.launch import Launch, descriptor
from attnfx.kernels.flash.host.tiles import Tile, forward_tiles
from attnfx.kernels.flash.host.walks import walks_of
from attnfx.kernels.flash.triton.forward import forward_kernel
from attnfx.kernels.gpu import capability
from attnfx.mask import rows_live
from attnfx.mask import tile_bounds as boxes
from attnfx.spec import AttentionSpec

FUNCTIONS = (
    "heads", "rows", "columns", "score", "keep", "whole", "weight", "extras", "slope", "leaf_scores", "leaf_weights",
    "whole_slope", "leaf_wholes",
)  # fmt: skip
LARGEST_HEAD_DIM = 256


def padded(width: int) -> int:
    """Return the tile width for a head dim: the next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


@lru_cache(maxsize=512)
def functions(
    spec: AttentionSpec, wide: frozenset[int] = frozenset(), inside: frozenset[int] = frozenset()
) -> Mapping[str, object]:
    """Return the generated functions of a spec by name; a function that it does not need is None. Raise the exceptions
    of `program` and `emit`, and PermissionError if generated code cannot be stored."""
    source = emit(spec, program(spec), wide, inside)
    made = module.load(source.text)
    return {name: getattr(made, name) if name in source.names else None for name in FUNCTIONS}


def program(spec: AttentionSpec) -> Program:
    """Return the program of a spec. Raise Unsupported if it cannot have one."""
    made = program_of(spec)
    if isinstance(made, str):
        raise Unsupported(made)
    return made


def expresses(spec: AttentionSpec, dtype: torch.dtype, head_dim: int, value_width: int) -> str | None:
    """Return why these kernels cannot run such calls, as one sentence, or None."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the inputs are {dtype}, and the kernels take float16, bfloat16 and float32"
    if getattr(torch, spec.out_dtype).itemsize > dtype.itemsize:
        return f"the result is {spec.out_dtype}, finer than the inputs' {dtype}, in which the kernels multiply"
    for name, width in (("head_dim", head_dim), ("value width", value_width)):
        if not 0 < width <= LARGEST_HEAD_DIM:
            return f"the {name} is {width}, and the kernels take 1 to {LARGEST_HEAD_DIM}"
    try:
        functions(spec)
    except (Unsupported, NotEmitted) as why:
        return str(why)
    except PermissionError as why:
        return f"generated code cannot be stored: {why}"
    return None


def supports(call: Call) -> str | None:
    """Return why these kernels cannot run the call, as one sentence, or None."""
    query = call.query
    if (why := expresses(call.spec, query.dtype, query.shape[3], call.value.shape[3])) is not None:
        return why
    if 0 in query.shape or 0 in call.key.shape:
        return "a dimension of the inputs has size 0"
    if any(x.numel() == 0 for x in call.captures):
        return "a captured tensor is empty"
    try:
        functions(call.spec, wide_captures(call.captures))
    except NotEmitted as why:
        return str(why)
    return None


def wide_captures(captures: Sequence[Tensor]) -> frozenset[int]:
    """Return the slots of captures whose offsets need more than 32 bits."""
    spans = [sum((n - 1) * s for n, s in zip(x.shape, x.stride())) for x in captures]
    return frozenset(slot for slot, span in enumerate(spans) if span >= 2**31)


@lru_cache(maxsize=512)
def never_outside(
    spec: AttentionSpec, sizes: tuple[tuple[str, int], ...], shapes: tuple[tuple[int, ...], ...]
) -> frozenset[int]:
    """Return the slots of captures and tables, of these shapes, whose loads are proved in bounds at all valid indices.
    A slot is left out if this cannot be proved, for example for an index that is itself loaded."""
    loads = {e for root in program(spec).roots for e in walk(root) if e.op == "load"}

    def leaves(index: Expr, length: int) -> bool:
        low, high = boxes.extent(index, dict(sizes))
        return low < 0 or high >= length

    outside = {e.value for e in loads if any(map(leaves, e.args, shapes[e.value]))}  # type: ignore[index]
    return frozenset(range(len(shapes))) - outside  # type: ignore[operator]


class Arguments:
    """The arguments that all kernels of a call share."""

    def __init__(self, call: Call) -> None:
        self.call, self.spec, self.program = call, call.spec, program(call.spec)
        self.sizes = call.sizes
        self.tensors = [*call.captures]
        for table in self.program.tables:  # a later table may load from earlier ones
            self.tensors.append(self.table(table))
        inside = never_outside(call.spec, tuple(self.sizes.items()), tuple(tuple(x.shape) for x in self.tensors))
        self.functions = functions(call.spec, wide_captures(self.tensors), inside)
        self.captures = tuple(
            (x.view(torch.uint8) if x.dtype == torch.bool else x, *x.stride()) for x in self.tensors
        )  # fmt: skip
        lengths = [n for x in self.tensors for n in x.shape]
        self.encoded = tuple(2 * n + 1 for n in (*self.sizes.values(), *lengths))

    def table(self, table: Table) -> Tensor:
        """Compute the table's values, with one dim per axis."""
        lengths = dict(b="B", h="H", i="T", j="S")
        sizes, count = self.sizes, len(table.axes)
        axes = {
            name: Axis(0, sizes[lengths[name]] if name in lengths else sizes["T"] + sizes["S"] - 1, n - count)
            for n, name in enumerate(table.axes)
        }
        values = Evaluator(self.tensors, sizes, axes, torch.float32, self.call.query.device)
        made = values.tensor(table.expr)
        full = made.expand([a.stop for a in axes.values()])
        if full.dtype == torch.int64 and full.numel() and not any(e.op == "load" for e in walk(table.expr)):
            full = full.to(torch.int32)  # only a loaded integer may need 64 bits
        return full

    def constants(self) -> dict[str, object]:
        """Return the constexpr arguments that all kernels share."""
        spec, call = self.spec, self.call
        d, dv = call.query.shape[3], call.value.shape[3]
        tf32 = call.query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        interpreted = call.query.device.type == "cpu"
        some = {name.upper(): self.functions[name] for name in ("heads", "rows", "columns", "score", "keep", "weight")}
        return some | dict(
            D=d, DV=dv, BD=padded(d), BDV=padded(dv),
            PER_GROUP=call.query.shape[1] // call.key.shape[1],
            SCALE=self.program.scale,
            THRESHOLD=round(spec.dropout * 2**32) if spec.random else None,
            RESCALE=1.0 / (1.0 - spec.dropout) if spec.dropout < 1.0 else 1.0,
            PRECISION="widened" if interpreted else "tf32" if tf32 else "ieee",
        )  # fmt: skip

    def dead_rows_average(self) -> bool:
        """Return whether a finite fill or an addend may leave a row without a live key: its masked scores decide it."""
        made = self.program
        return made.whole is not None and (made.drowned or not rows_live(self.spec, self.sizes))


def tiled(names: str, xs: tuple[Tensor, Tensor], rows: int, capability: int) -> dict[str, object]:
    """Pass the two operands that a kernel visits in tiles as descriptors if both allow it, else as pointers."""
    made = [descriptor(x, rows, padded(x.shape[3]), capability) for x in xs]
    by_pointer = None in made
    some: dict[str, object] = {}
    for (name, prefix), x, d in zip((n.split(":") for n in names.split()), xs, made):
        some |= {name: x if by_pointer else d, f"{prefix}_strides": x.stride() if by_pointer else None}
    return some


def forward(call: Call, tile: Tile | None = None, chosen: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Compute out (B, H, T, Dv) in the spec's dtype and logsumexp (B, H, T) in float32.

    logsumexp is a natural logarithm, and zero without a softmax. If given, `tile` is the only tile tried; `chosen` is
    tried before the table's. Raise CannotLaunch if none of the tiles compiles and fits the device.
    """
    query = call.query
    out, logsumexp = call.outputs()
    width = max(padded(query.shape[3]), padded(call.value.shape[3]))
    tiles = [tile] if tile is not None else forward_tiles(query.device, query.dtype, width, chosen, call.spec)
    run = lambda tile: forward_launch(call, out, logsumexp, tile).run(query.device)  # noqa: E731
    first_that_runs("forward", call, tiles, run, chosen)
    return out, logsumexp


def forward_launch(call: Call, out: Tensor, logsumexp: Tensor, tile: Tile, target: int | None = None) -> Launch:
    """Create the launch of the forward kernel for compute capability `target` (None: the GPU of the operands)."""
    target = capability(call.query.device) if target is None else target
    some, query, key, value = Arguments(call), call.query, call.key, call.value
    constants = some.constants()
    walks = walks_of(call, some.program.keep, tile, by_row=True)
    return Launch(
        forward_kernel,
        (-(-some.sizes["T"] // tile.rows), some.sizes["H"], some.sizes["B"]),
        dict(
            q=query, out=out, logsumexp=logsumexp, q_strides=query.stride(), out_strides=out.stride(),
            captures=some.captures, sizes=some.encoded, seed=call.seed, walks=walks.walks, order=walks.order,
            **tiled("k:k v:v", (key, value), tile.keys, target),
        ),
        constants
        | dict(
            BM=tile.rows, BN=tile.keys, SAFE=call.spec.safe, EXTRAS=some.functions["extras"],
            EXTRAS_COUNT=len(some.program.extras),
            WHOLE=some.functions["whole"] if some.dead_rows_average() else None,
        ),
        tile,
        walks.before,
    )  # fmt: skip
