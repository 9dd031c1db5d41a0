"""Express specs as calls of PyTorch's `flex_attention` operator, which the rewritten graph makes itself.

Inductor compiles the operator for the device: in C++ on a CPU, for inference alone; in Triton on a GPU. Any other inner
compiler runs it as dense operators, which store the scores.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr, walk
from attnfx.kernels.evaluate import Axis, Evaluator
from attnfx.kernels.flex.blocks import block_mask
from attnfx.kernels.flex.element import Program, Size, function, program_of
from attnfx.kernels.flex.form import Form, form_of
from attnfx.kernels.gpu import capability, too_old
from attnfx.mask import FLEX_TILE, visited
from attnfx.spec import AXES, AttentionSpec
from attnfx.targets import sdpa_dispatch as fused

LEAST_WIDTH = 16  # of a head on a GPU: the least width of Triton's matrix products
LOWEST = -2e38  # a smaller float32 overflows if it is multiplied by the logarithm of e to base 2
DEEPEST = 100  # operators in each other: tracing a program takes some eight frames of Python's stack for each
ARGUMENTS = (
    "query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_mod_other_buffers",
    "mask_mod_other_buffers",
)  # fmt: skip


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Return why this PyTorch's operator cannot be called, or None."""
    operator = getattr(torch.ops.higher_order, "flex_attention", None)
    if operator is None:
        return "this PyTorch lacks the flex_attention operator"
    taken = tuple(inspect.signature(type(operator).__call__).parameters)[1:]
    return None if taken == ARGUMENTS else "the flex_attention operator of this PyTorch takes other arguments"


def expresses(
    spec: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    value_width: int,
    target: int | None = None,
    *,
    live: bool,
    training: bool,
    summed: bool,
) -> str | None:
    """Return why the operator cannot run such calls, as one sentence, or None. With `target`, answer for a GPU of that
    compute capability. `live`: each row provably has a live key. `training`: a backward pass follows. `summed`: the
    graph reads the log-sum-exp, itself or to compute weights from it."""
    form, name = form_of(spec, live), str(dtype).removeprefix("torch.")
    if isinstance(form, str):
        return form
    if (why := missing()) is not None:
        return why
    if (deep := _depth(spec.score)) > DEEPEST:
        return f"the score program nests {deep} operators, and at most {DEEPEST} are traced for flex_attention"
    if spec.compute != "float32" or spec.out_dtype != name:
        needs = f"the attention needs {spec.compute} and {spec.out_dtype}"
        return f"PyTorch's flex_attention computes in float32 and returns {name}, and {needs}"
    if device.type not in ("cpu", "cuda"):
        return f"PyTorch's flex_attention does not run on {device.type}"
    if device.type == "cpu" and (why := _on_cpu(spec, training, summed)) is not None:
        return why
    if form.low and (training or summed):
        return "a row may lack a live key, and the log-sum-exp of flex_attention cannot tell its weights apart"
    return None if device.type == "cpu" else _on_gpu(device, head_dim, value_width, target)


def _depth(root: Expr) -> int:
    depth: dict[Expr, int] = {}
    for e in walk(root):
        depth[e] = 1 + max((depth[a] for a in e.args), default=0)
    return depth[root]


def _on_gpu(device: torch.device, head_dim: int, value_width: int, target: int | None) -> str | None:
    if min(head_dim, value_width) < LEAST_WIDTH:
        return f"PyTorch's flex_attention needs heads of width {LEAST_WIDTH} on a GPU"
    capable = target if target is not None or not torch.cuda.is_available() else capability(device)
    return None if capable is None else too_old(capable)


def _on_cpu(spec: AttentionSpec, training: bool, summed: bool) -> str | None:
    if training and any(c.grad for c in spec.captures):
        return "a tensor that the program loads from needs a gradient, and flex_attention has none on a CPU"
    if training:
        return "PyTorch's flex_attention has no backward pass on a CPU"
    if summed or spec.extra:
        what = "the softmax has columns beside the keys" if spec.extra else "parts of the weights are read"
        return f"{what}, and PyTorch's flex_attention does not return the log-sum-exp on a CPU"
    if not torch.cpu._is_avx2_supported() or os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        return "PyTorch's flex_attention needs a CPU with AVX2"
    return None


@lru_cache(maxsize=1)
def flash_installed() -> bool:
    """Return whether the operator can run on FlashAttention-4: this PyTorch can, and the package is installed."""
    from torch.nn.attention import flex_attention as library

    if "BACKEND" not in getattr(getattr(library, "FlexKernelOptions", None), "__annotations__", {}):
        return False
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except Exception:  # it imports the package around, whose other versions may fail to load
        return False


def on_flash(
    spec: AttentionSpec,
    dtype: torch.dtype,
    head_dim: int,
    value_width: int,
    sizes: Mapping[str, int],
    target: int,
    *,
    live: bool,
    known: bool,
    training: bool,
    summed: bool,
) -> str | None:
    """Return why FlashAttention-4 cannot run calls that the operator expresses, on a GPU with the compute capability
    `target`, or None. `known`: the sizes are constants. The other arguments are those that `expresses` takes."""
    form = form_of(spec, live)
    if isinstance(form, str):
        return form
    if str(dtype).removeprefix("torch.") not in fused.DTYPES:
        return "FlashAttention-4 takes float16 and bfloat16"
    if head_dim != value_width or head_dim not in fused.FLASH4_WIDTHS:
        return "FlashAttention-4 takes heads of width 64, 96 and 128"
    masked = form.keep is not A.TRUE
    if target // 10 != 9 and (masked or target // 10 != 10):
        return "FlashAttention-4 needs compute capability 9.x, or 10.x without a mask: there its tiles have 256 rows"
    if training or summed or spec.extra:
        return "FlashAttention-4 runs flex_attention for inference here, and without the log-sum-exp"
    if not known or any(not x.args for e in (form.score, form.keep) for x in walk(e) if x.op == "load"):
        return "FlashAttention-4 takes constant sizes, and tensors with dimensions"
    if not live or form.low:
        return "a row may lack a live key, and FlashAttention-4 may skip such a row"
    if masked and sizes["S"] <= FLEX_TILE:
        return "FlashAttention-4 needs a list of full tiles, and one tile holds all keys"
    return None


def takes(spec: AttentionSpec, live: bool, sizes: Mapping[str, int], known: bool) -> str | None:
    """Return why the operator is not called for a spec that it expresses, with these sizes, or None. `known`: they are
    constants."""
    form = form_of(spec, live)
    if not known and isinstance(form, Form) and any(t.exact for t in form.tables):
        return "an integer is computed through floats, and a table of it for flex_attention needs constant sizes"
    for letter, what in {"T": "queries", "S": "keys", "B": "batch", "H": "heads", "D": "width", "Dv": "width"}.items():
        if not sizes[letter]:
            return f"PyTorch's flex_attention takes no empty tensors, and the number of {what} is 0"
    bounded = {k: n for k, n in sizes.items() if k not in ("G", "D", "Dv")}
    if known and not visited(spec, bounded, FLEX_TILE, FLEX_TILE).total:
        return "the mask keeps no score, so the softmax has no weights for PyTorch's flex_attention"
    return None


@dataclass(frozen=True)
class Call:
    """One call of the operator, in parts that a rewrite traces into its graph. `gpu`: the operator returns the
    log-sum-exp and has a backward pass. `flash`: FlashAttention-4 runs it."""

    spec: AttentionSpec
    form: Form
    gpu: bool
    flash: bool = False

    @property
    def dead(self) -> bool:
        """Return whether a row whose scores are all -inf is NaN, as in eager. The operator returns zeros."""
        return not self.spec.safe and not self.spec.extra

    @property
    def compute(self) -> torch.dtype:
        return getattr(torch, self.spec.compute)

    @cached_property
    def masked(self) -> bool:
        return self.form.keep is not A.TRUE

    def learns(self, slot: int) -> bool:
        return slot < len(self.spec.captures) and self.spec.captures[slot].grad

    @property
    def unit(self) -> float:
        """Return the factor from the operator's log-sum-exp to natural units, in which FlashAttention-4 returns it."""
        return 1.0 if self.flash else _unit()

    @staticmethod
    def arguments(tiles: Sequence[Any], lengths: Sequence[Any], mask_mod: Any) -> tuple[Any, ...]:
        """Return the operator's argument `block_mask`, in the form of this PyTorch. `tiles` are as `block_mask` returns
        them."""
        from torch.nn.attention.flex_attention import BlockMask

        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        names += tuple(n.replace("kv", "q") for n in names)
        given = dict.fromkeys(names) | dict(zip(names, tiles))
        made = BlockMask(seq_lengths=tuple(lengths), BLOCK_SIZE=(FLEX_TILE, FLEX_TILE), mask_mod=mask_mod, **given)  # type: ignore[arg-type]
        return made.as_tuple()

    def score(self, sizes: Mapping[str, Size]) -> tuple[Program, Callable[..., Tensor]]:
        program = program_of(self.form.score, self.learns, sizes)
        made = function(program, ("b", "h", "i", "j"), sizes, self.compute, scored=True)
        return program, _halved(made) if self.gpu and self.form.low else made

    def mask(self, sizes: Mapping[str, Size]) -> tuple[Program, Callable[..., Tensor]]:
        program = program_of(self.form.keep, lambda _: False, sizes)
        return program, function(program, ("b", "h", "i", "j"), sizes, self.compute)

    def table(self, number: int, sizes: Mapping[str, Size], device: torch.device) -> Tensor:
        """Compute a table with eager operators."""
        table = self.form.tables[number]
        letter = str(table.variable.value)
        extent = sizes[AXES[letter]] if letter in AXES else sizes["T"] + sizes["S"] - 1
        made = Evaluator([], sizes, {letter: Axis(0, extent, -1)}, self.compute, device).tensor(table.body)  # type: ignore[arg-type]
        return made.contiguous()

    def slots(self, *programs: Expr) -> list[int]:
        """Return the slots that programs load from, in order."""
        return sorted({int(e.value) for p in programs for e in walk(p) if e.op == "load"})  # type: ignore[call-overload]

    def tiles(self, captures: Any, sizes: Mapping[str, Size], device: torch.device, backward: bool
              ) -> list[Tensor | None]:  # fmt: skip
        """Compute the block mask. `captures` has the tensors of all slots that the tiles depend on."""
        return block_mask(self.form.tiles, self.masked, self.form.average, captures, sizes, device, backward)

    def by_row(self, e: Expr, captures: Sequence[Tensor], sizes: Mapping[str, Size], device: torch.device) -> Tensor:
        """Compute an expression of the row, as a tensor that broadcasts over (batch, heads, rows)."""
        axes = {"b": Axis(0, sizes["B"], -3), "h": Axis(0, sizes["H"], -2), "i": Axis(0, sizes["T"], -1)}  # type: ignore[arg-type]
        return Evaluator(captures, sizes, axes, self.compute, device).tensor(e)  # type: ignore[arg-type]


def _halved(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Halve the scores that a GPU's kernel cannot convert to base 2, so that they stay finite. The largest of a row
    decides it only where all are lost, and then eager's scores are equal, as these are."""

    def made(*given: Tensor) -> Tensor:
        found = score(*given)
        low = (found < LOWEST) & (found > -math.inf)
        return torch.where(low, found - (0.5 * found).detach(), found)

    return made


@lru_cache(maxsize=1)
def _unit() -> float:
    """Return the natural logarithm of the base of the operator's log-sum-exp, from one score of this PyTorch."""
    one = torch.ones(1, 1, 1, 1)
    tiles = block_mask(A.TRUE, False, False, [], dict(B=1, H=1, T=1, S=1), one.device, False)
    known = Call.arguments(tiles, [1, 1], lambda b, *_: b >= 0)
    with torch.no_grad():
        found = torch.ops.higher_order.flex_attention(one, one, one, lambda score, *_: score, known, 1.0, {})
    return min((1.0, math.log(2.0)), key=lambda x: abs(x - 1.0 / float(found[1])))


def call_of(spec: AttentionSpec, live: bool, device: torch.device) -> Call | None:
    """Return the call for a spec on a device, or None if it cannot be one. `live`: each row provably has a live key."""
    form = form_of(spec, live)
    return None if isinstance(form, str) else Call(spec, form, device.type != "cpu")
