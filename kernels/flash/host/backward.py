"""Run the backward pass of a call: several kernels in sequence, and PyTorch operators for small tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir.expr import walk
from attnfx.ir.gradient import gradient
from attnfx.kernels.call import Call
from attnfx.kernels.chunked.program import has_gradient
from attnfx.kernels.evaluate import Axis, Evaluator, block_axes, toeplitz
from attnfx.kernels.flash.codegen.program import DIAGONAL, LOG2E, Leaf
from attnfx.kernels.flash.host.fallback import first_that_runs
from attnfx.kernels.flash.host.forward import Arguments, padded, tiled
from attnfx.kernels.flash.host.launch import Launch
from attnfx.kernels.flash.host.tiles import Tile, backward_tiles
from attnfx.kernels.flash.host.walks import walks_of
from attnfx.kernels.flash.triton.backward import delta_kernel
from attnfx.kernels.flash.triton.backward_keys import keys_kernel
from attnfx.kernels.flash.triton.backward_rows import rows_kernel
from attnfx.kernels.flash.triton.pairs import pairs_kernel
from attnfx.kernels.gpu import capability
from attnfx.mask import rows_live

Tiles = tuple[Tile, Tile]  # for the pass over keys and for the pass over rows
PAIR_ELEMENTS = 1 << 24  # float32 elements of a gradient by row and key, before its reduction into a smaller capture


def backward(
    call: Call,
    grad_out: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    tiles: Tiles | None = None,
    grad_logsumexp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of query, key, value and the captures with `grad`, in each tensor's dtype, contiguous.

    Results are deterministic: no atomics are used. If given, `tiles` is the only pair tried. Raise CannotLaunch if
    none of the tiles compiles and fits the device.
    """
    width = max(padded(call.query.shape[3]), padded(call.value.shape[3]))
    some = [tiles] if tiles is not None else backward_tiles(call.query.device, call.query.dtype, width, call.spec)
    return first_that_runs(
        "backward", call, some,
        lambda tiles: Backward(call, grad_out, out, logsumexp, tiles).gradients(grad_logsumexp),
    )  # fmt: skip


class Backward:
    """The kernels of one backward pass, and the tensors that they exchange."""

    def __init__(
        self, call: Call, grad_out: Tensor, out: Tensor, logsumexp: Tensor, tiles: Tiles, target: int | None = None
    ) -> None:
        self.target = capability(call.query.device) if target is None else target
        self.call, self.some = call, Arguments(call)
        self.program, self.sizes = self.some.program, self.some.sizes
        self.grad_out, self.out, self.logsumexp = grad_out, out, logsumexp.contiguous()
        self.tiles = tiles
        # per row: logsumexp in units of log 2, and delta
        self.statistics = torch.empty((*logsumexp.shape, 2), dtype=torch.float32, device=logsumexp.device)
        exact = self.program.softmax and call.query.dtype == torch.float32
        self.correction = torch.empty_like(self.logsumexp) if exact else None
        self.average = self.some.dead_rows_average()
        self.below, self.dead = None, None
        if self.average:
            assert self.program.lost is not None
            self.below = self.program.lost
            some = (self.logsumexp <= self.below).any(2).to(torch.uint8)
            again = self.logsumexp
            if call.spec.safe:  # a row whose scores are all -inf gets zero weights
                again = again.masked_fill(again == -math.inf, math.inf)
            self.dead = (some, again, torch.empty_like(self.logsumexp))
        elif call.spec.safe:
            self.below = -math.inf

    # -- kernels --------------------------------------------------------------------------------
    def delta_launch(self) -> Launch:
        tile = Tile(64 if self.grad_out.device.type != "cpu" else 16, 0, 4, 1)
        sizes = self.sizes
        width = self.call.value.shape[3]
        return Launch(
            delta_kernel,
            (-(-sizes["T"] // tile.rows), sizes["H"], sizes["B"]),
            dict(
                grad_out=self.grad_out, out=self.out, logsumexp=self.logsumexp, statistics=self.statistics,
                grad_strides=self.grad_out.stride(), out_strides=self.out.stride(), sizes=self.some.encoded,
            ),
            dict(BM=tile.rows, DV=width, BDV=padded(width), DEAD=self.below),
            tile,
        )  # fmt: skip

    def _arguments(self) -> dict[str, object]:
        call = self.call
        return dict(
            q=call.query, k=call.key, v=call.value, grad_out=self.grad_out, statistics=self.statistics,
            correction=self.correction, q_strides=call.query.stride(), k_strides=call.key.stride(),
            v_strides=call.value.stride(), grad_strides=self.grad_out.stride(), captures=self.some.captures,
            sizes=self.some.encoded, seed=call.seed, dead=self.dead,
        )  # fmt: skip

    def _constants(self, tile: Tile, leaf: int | None) -> dict[str, object]:
        factor = self.program.factor if leaf is None else None
        names = ("leaf_scores", "leaf_weights", "leaf_wholes")
        some = {n.upper(): None if leaf is None else self.some.functions[n] for n in names}
        return self.some.constants() | some | dict(
            BM=tile.rows, BN=tile.keys, LEAF=leaf,
            FACTOR=1.0 if factor is None else factor,
            SLOPE=None if factor is not None or leaf is not None else self.some.functions["slope"],
            WHOLE=self.some.functions["whole"] if self.average else None,
            WHOLE_SLOPE=self.some.functions["whole_slope"] if self.average and leaf is None else None,
        )  # fmt: skip

    def keys_launch(self, dk: Tensor, dv: Tensor, leaf: int | None = None) -> Launch:
        """Launch the gradients of keys and values; with `leaf`, of a load by key instead, into dk (B, H, S)."""
        tile, sizes = self.tiles[0], self.sizes
        heads = self.call.key.shape[1] if leaf is None else sizes["H"]
        walks = walks_of(self.call, self.program.keep, tile, by_row=False)
        return Launch(
            keys_kernel,
            (-(-sizes["S"] // tile.keys), heads, sizes["B"]),
            self._arguments()
            | tiled("q:q grad_out:grad", (self.call.query, self.grad_out), tile.rows, self.target)
            | dict(dk=dk, dv=dv, dk_strides=dk.stride(), dv_strides=dv.stride(), walks=walks.walks, order=walks.order),
            self._constants(tile, leaf),
            tile,
            walks.before,
        )  # fmt: skip

    def rows_launch(self, result: Tensor, leaf: int | None = None) -> Launch:
        """Launch the gradient of the queries; with `leaf`, of a load by row instead, (B, H, T)."""
        tile, sizes = self.tiles[1], self.sizes
        walks = walks_of(self.call, self.program.keep, tile, by_row=True)
        return Launch(
            rows_kernel,
            (-(-sizes["T"] // tile.rows), sizes["H"], sizes["B"]),
            self._arguments()
            | tiled("k:k v:v", (self.call.key, self.call.value), tile.keys, self.target)
            | dict(result=result, result_strides=result.stride(), walks=walks.walks, order=walks.order),
            self._constants(tile, leaf)
            | dict(EXTRAS=self.some.functions["extras"], EXTRAS_COUNT=len(self.program.extras)),
            tile,
            walks.before,
        )  # fmt: skip

    # -- the whole ------------------------------------------------------------------------------
    def gradients(self, grad_logsumexp: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        call, device = self.call, self.call.query.device
        softmax = self.program.softmax
        if softmax:
            self.delta_launch().run(device)
            if grad_logsumexp is not None:  # its derivative by a score is the score's probability
                self.statistics[..., 1] -= grad_logsumexp
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (call.query, call.key, call.value))
        self.rows_launch(dq).run(device)
        self.keys_launch(dk, dv).run(device)
        captures = {
            n: torch.zeros(call.captures[n].shape, dtype=torch.float32, device=device)
            for n, c in enumerate(call.spec.captures)
            if c.grad
        }
        for number, leaf in enumerate(self.program.leaves):
            self._add_leaf(number, leaf, captures)
        if softmax:
            self._add_extras(captures)
            may_be_nan = self.program.keep is not None and not self.average and not call.spec.safe
            if may_be_nan and not rows_live(call.spec, self.sizes):
                # a row of NaN weights makes the gradient of every value of its head NaN
                lost = (self.logsumexp == -math.inf).unflatten(1, (call.key.shape[1], -1)).flatten(2).any(2)
                dv.masked_fill_(lost[..., None, None], math.nan)
        grads = [captures[n].to(call.captures[n].dtype) for n, c in enumerate(call.spec.captures) if c.grad]
        return dq, dk, dv, grads

    # -- captures -------------------------------------------------------------------------------
    def _values(self) -> Evaluator:
        sizes = self.sizes
        axes = block_axes((0, sizes["B"]), (0, sizes["H"]), (0, sizes["T"]), (0, sizes["S"]))
        return Evaluator(self.some.tensors, sizes, axes, torch.float32, self.call.query.device)

    def _add_leaf(self, number: int, leaf: Leaf, captures: dict[int, Tensor]) -> None:
        shape, device = self.logsumexp.shape, self.call.query.device
        total = captures[leaf.load.value]  # type: ignore[index]
        if leaf.space in ("diagonal", "pair"):
            self._add_pairs(number, leaf, total)
        elif leaf.space == "column":
            found = torch.empty((*shape[:2], self.sizes["S"]), dtype=torch.float32, device=device)
            self.keys_launch(found, found, number).run(device)
            self._values().without("i").add_gradient(leaf.load, found[:, :, None], total)
        else:
            found = torch.empty(shape, dtype=torch.float32, device=device)
            self.rows_launch(found, number).run(device)
            self._values().without("j").add_gradient(leaf.load, found[..., None], total)

    def _add_pairs(self, number: int, leaf: Leaf, total: Tensor) -> None:
        sizes, size_t, size_s = self.sizes, self.sizes["T"], self.sizes["S"]
        by = {name: name in leaf.load.free for name in "bh"}
        shared = [sizes[n] if by[v] else 1 for v, n in (("b", "B"), ("h", "H"))]
        if leaf.space == "pair":
            block = self._pair_tile().rows
            rows = max(PAIR_ELEMENTS, total.numel()) // (math.prod(shared) * size_s)
            rows = max(1, -(-rows // block)) * block
            for i0 in range(0, size_t, rows):
                i1 = min(i0 + rows, size_t)
                found = total.new_empty((*shared, i1 - i0, size_s))
                self.pairs_launch(found, number, leaf, i0).run(total.device)
                axes = block_axes((0, shared[0]), (0, shared[1]), (i0, i1), (0, size_s))
                values = Evaluator(self.some.tensors, sizes, axes, torch.float32, total.device)
                values.add_gradient(leaf.load, found, total)
            return
        step = self._pair_tile().rows
        before = -(-size_t // step) * step
        found = total.new_zeros((*shared, 2, before + -(-size_s // step) * step))
        self.pairs_launch(found, number, leaf).run(total.device)
        first = before - (size_t - 1)  # where j - i = 1 - T
        line = found.sum(2, keepdim=True)[..., first : first + size_t + size_s - 1]
        form = toeplitz(leaf.load)
        assert form is not None
        along = {"b": Axis(0, shared[0], -4), "h": Axis(0, shared[1], -3), DIAGONAL: Axis(0, size_t + size_s - 1, -1)}
        values = Evaluator(self.some.tensors, sizes, along, torch.float32, total.device)
        values.add_gradient(form, line, total)

    def _pair_tile(self) -> Tile:
        """Return the tile of the pairs kernel: square, for diagonals, with few elements per thread. A thread holds a
        sum in addition to two products. Warps also split a tile's columns only on sm_90, whose matrix instructions span
        four warps."""
        tile = self.tiles[1]
        side = min(tile.rows, tile.keys)
        if self.target >= 90:
            return tile._replace(rows=side, keys=side, warps=max(8, tile.warps))
        return tile._replace(rows=min(side, 32), keys=min(side, 32))

    def pairs_launch(self, result: Tensor, number: int, leaf: Leaf, first: int = 0) -> Launch:
        """Launch `pairs_kernel`, the gradient of a load that depends on both rows and keys. It covers as many rows as
        the result has, from `first`, a multiple of the tile's rows."""
        tile = self._pair_tile()
        sizes, diagonal = self.sizes, leaf.space == "diagonal"
        walks = walks_of(self.call, self.program.keep, tile, by_row=True, spans=True)
        rows = sizes["T"] if diagonal else result.shape[-2]
        blocks_i, blocks_j = -(-rows // tile.rows), -(-sizes["S"] // tile.keys)
        part = (2 * (first // tile.rows) + 3, 2 * rows + 1)
        constants = self._constants(tile, number)
        for name in ("FACTOR", "SLOPE", "WHOLE_SLOPE"):
            del constants[name]
        by_batch, by_head = "b" in leaf.load.free, "h" in leaf.load.free
        return Launch(
            pairs_kernel,
            (
                blocks_i + blocks_j - 1 if diagonal else blocks_i * blocks_j,
                sizes["H"] if by_head else 1,
                sizes["B"] if by_batch else 1,
            ),
            self._arguments() | dict(result=result, part=part, walks=walks.walks),
            constants | dict(BY_BATCH=by_batch, BY_HEAD=by_head, DIAGONAL=diagonal),
            tile,
            walks.before,
        )

    def _add_extras(self, captures: dict[int, Tensor]) -> None:
        """Add the gradients of captures in the extra logits. Such a logit lacks a value: d logit = -weight * delta."""
        values = self._values().without("j")
        for logit in self.call.spec.extra:
            wanted = [e for e in walk(logit) if has_gradient(self.call.spec, e)]
            if not wanted:
                continue
            weight = (values.tensor(logit) * LOG2E - self.logsumexp[..., None] * LOG2E).exp2()
            if self.correction is not None:
                weight = weight / self.correction[..., None].exp2()
            slope = -weight * self.statistics[..., 1:]
            for load, local in zip(wanted, gradient(logit, wanted)):
                part = slope if local is A.const(1.0) else slope * values.tensor(local)
                values.add_gradient(load, part, captures[load.value])  # type: ignore[index]
