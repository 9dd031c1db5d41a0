"""Run a spec through ATen's fused CPU attention if the score is scale * dot + bias under a mask.

Bias and mask are passed to the operator as an additive mask, for one block of queries on its live key range at a time.
If neither depends on the query beyond plain causality, a single call with a mask of one row suffices.

The chunked tier computes the rows that the operator gets wrong or loses precision on, with their whole block of rows:
rows without a live key (the operator returns 0 and a meaningless logsumexp), and in the backward pass rows whose
logsumexp is too large to subtract from a score. If an operand holds NaN, or values so large that a product overflows,
the chunked tier computes the whole call: the operator returns 0 for a row of NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr, walk
from attnfx.kernels.call import Call
from attnfx.kernels.chunked import attention as chunked
from attnfx.kernels.chunked.block_run import Run
from attnfx.kernels.evaluate import Axis, Evaluator, toeplitz
from attnfx.mask import KeyRange, key_ranges, mask_of, rows_live
from attnfx.mask.affine import numeric
from attnfx.spec import AttentionSpec, I, J, additive

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

MAX_HEAD_DIM = 512
# Beyond this value, float32 rounds a logsumexp by more than 1e-4, which would be visible in exp(score - logsumexp).
LARGEST_LOGSUMEXP = 1e3
# Queries of a block whose mask is materialized. Measured on 2 cores of an AMD EPYC, 8 heads x 4096 x 64, float32.
ROWS = 256
GROUP_ROWS = 64  # most queries of a group of heads that are rows of one call

_ZERO = A.const(0.0)


@dataclass(frozen=True)
class Form:
    """A score of the form scale * dot + bias at the elements where all of `keep` hold.

    scale    a constant, or an expression without the indices
    keep     the mask's conjuncts
    fill     the score of masked elements, which decides rows without a live key; None without a mask
    """

    scale: float | Expr
    bias: Expr
    keep: tuple[Expr, ...]
    fill: float | None


@lru_cache(maxsize=1024)
def form_of(spec: AttentionSpec) -> Form | str:
    """Convert a spec to the operator's form, or return why this is impossible."""
    if spec.normaliser != "softmax":
        return "the weights are not a softmax"
    if spec.weight is not A.PROB:
        return "the weights are changed after the softmax"
    if spec.random:
        return "the attention has dropout"
    mask = mask_of(spec.score)
    score, keep = spec.score, A.TRUE
    if mask is not None and score.op == "where" and mask.keep is score.args[0] and score.args[2].op == "const":
        keep, score = score.args[0], score.args[1]
    found = additive(score)
    if found is None:
        return "the score is not a multiple of the dot product plus a bias"
    scale, bias, inner = found
    if inner is not None:
        keep = A.and_(keep, inner)
    if any(e.op in ("dot", "prob") for e in walk(keep)):
        return "the mask depends on the scores"
    if mask is not None and keep is not mask.keep:
        keep, bias = A.TRUE, A.where(keep, bias, A.const(mask.fill)) if keep is not A.TRUE else bias
    conjuncts = keep.args if keep.op == "and" else () if keep is A.TRUE else (keep,)
    return Form(scale, bias, conjuncts, None if mask is None else float(mask.fill))


def expresses(
    spec: AttentionSpec, dtype: torch.dtype, device: torch.device, head_dim: int, value_width: int
) -> str | None:
    """Return why the operator cannot run such calls, or None."""
    form = form_of(spec)
    if isinstance(form, str):
        return form
    if device.type != "cpu":
        return f"PyTorch's CPU operator does not run on {device.type}"
    compute = "float64" if dtype == torch.float64 else "float32"
    if spec.compute != compute:
        return f"PyTorch's operator computes {dtype} in {compute}, and the attention needs {spec.compute}"
    if max(head_dim, value_width) > MAX_HEAD_DIM:
        return f"PyTorch's operator takes a head_dim up to {MAX_HEAD_DIM}"
    return None


def supports(call: Call) -> str | None:
    """Return why the operator cannot run this call, or None."""
    query, key, value = call.query, call.key, call.value
    why = expresses(call.spec, query.dtype, query.device, query.shape[3], value.shape[3])
    if why is None and not (query.numel() and key.numel() and value.numel()):
        return "PyTorch's operator crashes on empty tensors"
    return why


@dataclass(frozen=True)
class Layout:
    """The division of a call of these sizes into calls of the operator.

    causal    use the operator's causal mode: one of the mask's conjuncts is j <= i, and nothing else depends on i
    single    one call for all queries
    mask      the additive mask: the bias, or -inf where a remaining conjunct does not hold
    blocks    the calls; neighbors that see the same keys and need no mask are merged
    """

    causal: bool
    single: bool
    mask: Expr
    blocks: tuple[KeyRange, ...]


@lru_cache(maxsize=1024)
def _layout(spec: AttentionSpec, items: tuple[tuple[str, int], ...], rows: int) -> Layout:
    sizes = dict(items)
    form = form_of(spec)
    assert isinstance(form, Form)
    plain = A.sub(I, J)
    causal = [e for e in form.keep if e.op == "ge0" and numeric(A.sub(e.args[0], plain), sizes) is A.const(0)]
    keep = tuple(e for e in form.keep if e not in causal)
    if not any("i" in e.free for e in (*keep, form.bias)):
        return Layout(bool(causal), True, _mask(keep, form.bias), (KeyRange(0, sizes["T"], 0, sizes["S"], not keep),))
    out: list[KeyRange] = []
    for r in key_ranges(spec, sizes, rows):
        last = out[-1] if out else None
        if last and form.bias is _ZERO and last.full and r.full and (last.j0, last.j1) == (r.j0, r.j1):
            out[-1] = last._replace(i1=r.i1)
        else:
            out.append(r)
    return Layout(False, False, _mask(form.keep, form.bias), tuple(out))


def _mask(keep: tuple[Expr, ...], bias: Expr) -> Expr:
    return A.where(A.and_(*keep), bias, A.const(-math.inf))


class _Run:
    """One call: its operands in the operator's layout, and its blocks."""

    def __init__(self, call: Call, columns: int = 0):
        """Prepare the operands, widened by `columns` columns of zeros."""
        form = form_of(call.spec)
        assert isinstance(form, Form)
        self.spec, self.form = call.spec, form
        self.sizes, self.captures = call.sizes, call.captures
        self.layout = _layout(call.spec, tuple(self.sizes.items()), ROWS)
        self._tiles: dict[tuple, Tensor] = {}
        self.compute = call.compute
        one = Axis(0, 1, -2), Axis(0, 1, -1)
        self.scale = float(self.evaluator(*one)(form.scale) if isinstance(form.scale, Expr) else form.scale)
        width = max(call.query.shape[3], call.value.shape[3]) + columns
        self.query, self.key, self.value = (self.widened(x, width) for x in (call.query, call.key, call.value))
        self.value_width = call.value.shape[3]
        self.safe_range = self._in_range()

    @staticmethod
    def widened(x: Tensor, width: int) -> Tensor:
        """Pad with zeros to the common width of query, key and value, and make the last dim contiguous."""
        if x.shape[-1] < width:
            return pad(x, (0, width - x.shape[-1]))
        return x if x.stride(-1) == 1 else x.contiguous()

    def _in_range(self) -> bool:
        """Return whether all operands are finite and no product of query and key can overflow."""
        # Cauchy-Schwarz on the norms of the whole tensors: one pass over each, which also finds NaN and inf
        query, key = (max(_norm(x), 1.0) for x in (self.query, self.key))
        limit = 1e300 if self.compute == torch.float64 else 1e36
        return query * key * max(abs(self.scale), 1.0) < limit and math.isfinite(self.scale)

    def evaluator(self, i: Axis, j: Axis) -> Evaluator:
        axes = {"b": Axis(0, self.sizes["B"], -4), "h": Axis(0, self.sizes["H"], -3), "i": i, "j": j}
        return Evaluator(self.captures, self.sizes, axes, self.compute, torch.device("cpu"))

    def mask(self, r: KeyRange) -> Tensor | None:
        """Return the additive mask of a block, with four dims that broadcast; None if there is nothing to add."""
        program = self.form.bias if r.full else self.layout.mask
        if program is _ZERO:
            return None
        # a mask that depends on j - i alone is the same in blocks of one shape at one distance from the diagonal
        place = (program, r.i1 - r.i0, r.j1 - r.j0, r.j0 - r.i0) if toeplitz(program) is not None else None
        if place is not None and place in self._tiles:
            return self._tiles[place]
        rows = Axis(0, 1, -2) if self.layout.single else Axis(r.i0, r.i1, -2)
        mask = self.evaluator(rows, Axis(r.j0, r.j1, -1)).tensor(program)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape).to(self.compute)
        if place is not None:
            self._tiles = {place: mask}  # keep the last one: neighboring blocks share it
        return mask

    @cached_property
    def surely_live(self) -> bool:
        bias_is_finite = not any(e.op == "load" for e in walk(self.form.bias))
        return bias_is_finite and (self.form.fill is None or rows_live(self.spec, self.sizes))

    def dead(self, r: KeyRange, mask: Tensor | None) -> Tensor | bool:
        """Mark the rows of a block that, for some batch and head, lack a live key or have NaN in their mask."""
        if mask is None or self.surely_live:
            return False
        if self.layout.causal:  # row i sees the keys up to i
            best = mask.cummax(-1)[0]
            best = best[..., torch.arange(r.i0, r.i1).clamp(max=best.shape[-1] - 1)].mT
        else:
            best = mask.amax(-1, keepdim=True)
        # a finite fill can be part of the bias: keys below half of it are dead too
        lowest = -math.inf if self.form.fill is None else self.form.fill / 2
        return ~(best > lowest).all(dim=1).all(dim=0).squeeze(-1)


def _norm(x: Tensor) -> float:
    """Compute the Euclidean norm of all elements, in two steps if the memory has gaps (several times faster)."""
    if not (x.is_contiguous() or x.transpose(1, 2).is_contiguous()):
        x = torch.linalg.vector_norm(x, dim=-1)
    return float(torch.linalg.vector_norm(x))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Compute out and logsumexp, as `chunked.forward` does."""
    heads, groups, rows = call.query.shape[1], call.key.shape[1], call.query.shape[2]
    of_group = heads // groups * rows
    spec = _of_groups(call.spec, rows == 1) if rows < of_group <= GROUP_ROWS else None
    if spec is None:
        return _forward_blocks(call)
    folded = call.query.unflatten(1, (groups, -1)).flatten(2, 3)
    got = _forward_blocks(replace(call, spec=spec, query=folded))
    out, logsumexp = call.outputs()
    for whole, part in zip((out, logsumexp), got):
        whole.copy_(part.unflatten(2, (-1, rows)).flatten(1, 2))
    return out, logsumexp


@lru_cache(maxsize=1024)
def _of_groups(spec: AttentionSpec, one: bool) -> AttentionSpec | None:
    """Return the spec of a call whose rows are the queries of all heads of a group, so that keys and values are read
    once for the group; None if a score depends on its head or query. With `one`, each head has a single query."""
    scores = [spec.score, *spec.extra]
    if one:
        scores = [A.substitute(e, {I: A.const(0), A.size("T"): A.const(1)}) for e in scores]
    if any(
        "h" in e.free or "i" in e.free or any(x.op == "size" and x.value in ("H", "T") for x in walk(e)) for e in scores
    ):
        return None
    return replace(spec, score=scores[0], extra=tuple(scores[1:]))


def _forward_blocks(call: Call) -> tuple[Tensor, Tensor]:
    run = _Run(call)
    if not run.safe_range:
        return chunked.forward(call)
    shape = call.query.shape[:3]
    out, logsumexp = call.outputs()
    bad = torch.zeros(shape[2], dtype=torch.bool)
    for r in run.layout.blocks:
        rows, keys = slice(r.i0, r.i1), slice(r.j0, r.j1)
        if r.j0 >= r.j1:
            bad[rows] = True
            continue
        mask = run.mask(r)
        bad[rows] = run.dead(r, mask)
        part, total = _forward(
            run.query[:, :, rows], run.key[:, :, keys], run.value[:, :, keys], 0.0, run.layout.causal,
            attn_mask=mask, scale=run.scale,
        )  # fmt: skip
        part = part[..., : run.value_width]
        if call.spec.extra:
            part, total = _with_extra(run, r, part, total)
        if part.shape == out.shape and part.stride() == out.stride() and part.dtype == out.dtype:
            out = part  # one call computed the whole output, in the promised layout
        else:
            out[:, :, rows] = part
        logsumexp[:, :, rows] = total
    if bool(bad.any()):
        rest = Run(call)
        chunked.forward_rows(rest, rest.plan.holding(bad), out, logsumexp)
    return out, logsumexp


def _with_extra(run: _Run, r: KeyRange, part: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Renormalize one block's output and logsumexp to include the extra logits in the softmax."""
    values = run.evaluator(Axis(r.i0, r.i1, -2), Axis(0, 1, -1))
    logits = [values.tensor(e).expand(*total.shape, 1).squeeze(-1) for e in run.spec.extra]
    both = torch.stack([total, *logits]).logsumexp(0)
    return part * (total - both).exp().unsqueeze(-1).to(part.dtype), both


def backward(
    call: Call, grad_out: Tensor, out: Tensor, logsumexp: Tensor, grad_logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Compute the gradients, as `chunked.backward` does. If a capture needs a gradient, call `chunked.backward`.

    The operator sums out * grad_out over a row and subtracts the sum from the gradient of its weights. One more column,
    -grad_logsumexp in the output and ones in its gradient, makes it include the gradient of the logsumexp.
    """
    column = grad_logsumexp is not None
    run = None if any(c.grad for c in call.spec.captures) else _Run(call, columns=int(column))
    rounded = column and call.query.dtype.itemsize < 4  # the added column would be rounded to the dtype
    if run is None or rounded or not run.safe_range:
        return chunked.backward(call, grad_out, out, logsumexp, grad_logsumexp)
    bad = ~((logsumexp.abs() < LARGEST_LOGSUMEXP).all(dim=1).all(dim=0))
    rest, which = None, set()
    grad = grad_out
    if bool(bad.any()):
        rest = Run(call)
        rest.plan.widen(logsumexp)
        which = rest.plan.holding(bad)
        for n in which:  # disable these rows for the operator: weights exp(-inf), multiplied by zero
            bad[rest.plan.rows[n].i0 : rest.plan.rows[n].i1] = True
        at = bad.view(1, 1, -1, 1)
        out, grad = out.masked_fill(at, 0.0), grad_out.masked_fill(at, 0.0)
        logsumexp = logsumexp.masked_fill(at.squeeze(-1), math.inf)
    grad, out = (run.widened(x.to(call.query.dtype), run.query.shape[-1]) for x in (grad, out))
    if grad_logsumexp is not None:
        grad[..., -1], out[..., -1] = 1.0, -grad_logsumexp
    like = call.query, call.key, call.value
    sums: list[Tensor] = []  # the gradients of query, key and value
    if run.layout.blocks[0][:4] != (0, call.query.shape[2], 0, call.key.shape[2]):
        compute = torch.promote_types(call.query.dtype, torch.float32)
        sums = [torch.zeros(call.query.shape, dtype=call.query.dtype)]
        sums += [torch.zeros(x.shape, dtype=compute) for x in like[1:]]
    for r in run.layout.blocks:
        rows, keys = slice(r.i0, r.i1), slice(r.j0, r.j1)
        if r.j0 >= r.j1:
            continue
        parts = list(_backward(
            grad[:, :, rows], run.query[:, :, rows], run.key[:, :, keys], run.value[:, :, keys], out[:, :, rows],
            logsumexp[:, :, rows], 0.0, run.layout.causal, attn_mask=run.mask(r), scale=run.scale,
        ))  # fmt: skip
        if not sums:  # one call computes everything; each part is freed once copied
            sums = [parts.pop(0)[..., : x.shape[3]].contiguous() for x in like]
            break
        for total, at, x in zip(sums, (rows, keys, keys), like):
            total[:, :, at] += parts.pop(0)[..., : x.shape[3]]
    query, key, value = (total.to(x.dtype) for total, x in zip(sums, like))
    if rest is None:
        return query, key, value, []
    more = chunked.Gradients(rest, query, grad_logsumexp)
    through = chunked.ThroughValues(rest, grad_out)
    more.add(through, which)
    return query, (key + more.key).to(key.dtype), (value + through.value).to(value.dtype), []
