"""Which tiles a kernel visits, and in which of them no score is masked.

A kernel owns a block of one index (rows, or keys in the pass for their gradients) and walks along the other. For each
block it is given four numbers [start, full_start, full_end, end], multiples of the step but for `end`: tiles outside
[start, end) hold no live score, tiles inside [full_start, full_end) no dead one and nothing out of bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import islpy as isl
import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr, substitute
from attnfx.kernels.flash.device import lasting
from attnfx.mask import key_ranges
from attnfx.mask import polyhedron as P
from attnfx.spec import I, J

Walk = tuple[int, int, int, int]


def along_keys(keep: Expr | None, sizes: Mapping[str, int], block: int, step: int) -> tuple[Walk, ...]:
    """For each block of `block` rows, the walk along the keys in steps of `step`."""
    return _walks(keep or A.TRUE, tuple(sorted(sizes.items())), block, step)


def along_rows(keep: Expr | None, sizes: Mapping[str, int], block: int, step: int) -> tuple[Walk, ...]:
    """For each block of `block` keys, the walk along the rows in steps of `step`."""
    turned = substitute(keep or A.TRUE, {I: J, J: I, A.size("T"): A.size("S"), A.size("S"): A.size("T")})
    # the extents of i and j are T and S by name, so both change places; T and S in the mask itself do as well
    return _walks(turned, tuple(sorted({**sizes, "T": sizes["S"], "S": sizes["T"]}.items())), block, step)


@lru_cache(maxsize=512)
def _walks(keep: Expr, items: tuple[tuple[str, int], ...], block: int, step: int) -> tuple[Walk, ...]:
    sizes = dict(items)
    last = sizes["S"]
    keep = P.numeric(keep, sizes)
    # a score program with this mask: `key_ranges` takes what it masks from there
    found = key_ranges(A.where(keep, A.DOT, A.const(float("-inf"))), sizes, block)
    holes = _holes(keep, sizes, block, [(r.j0, r.j1) for r in found if r.j0 < r.j1 and not r.full])
    out = []
    for n, r in enumerate(found):
        start, end = r.j0 // step * step, r.j1
        low, high = (r.j0, r.j1) if r.full else holes.get(n, (r.j0, r.j0))
        low, high = max(-(-low // step) * step, start), high // step * step
        out.append((start, low, high, end) if low < high <= last else (start, start, start, end))
    return tuple(out)


def _holes(keep: Expr, sizes: Mapping[str, int], block: int, ranges: list[tuple[int, int]]) -> dict[int, tuple]:
    """For each block, the longest run of keys without a dead one; nothing where that is too hard to say."""
    sure = P.text(keep, False)
    if not ranges or sure == P.NO:
        return {}
    hidden = P.hidden(keep, "j")
    within = f"{P.domain(sizes, hidden + 'j')} and {block} t <= i < {block} t + {block}"
    try:
        with P.solver(5) as context:
            dead = isl.Map(f"{{ [t] -> [j] : exists {', '.join(hidden)} : {within} and not ({sure}) }}", context)
            blocks = -(-sizes["T"] // block)
            box = isl.Map(f"{{ [t] -> [j] : 0 <= t < {blocks} and 0 <= j < {sizes['S']} }}", context)
            free = box.subtract(dead).coalesce()
            pieces: list[tuple[isl.PwAff, isl.PwAff]] = []
            free.make_disjoint().foreach_basic_map(lambda m: pieces.append(_ends(m)))
            best: dict[int, tuple[int, int]] = {}
            for low, high in pieces:
                for t in range(blocks):
                    a, b = _value(low, t), _value(high, t)
                    if a is not None and b is not None and b + 1 - a > best.get(t, (0, 0))[1] - best.get(t, (0, 0))[0]:
                        best[t] = (a, b + 1)
            return best
    except P.TooHard:
        return {}


def _ends(piece: isl.BasicMap) -> tuple[isl.PwAff, isl.PwAff]:
    whole = isl.Map.from_basic_map(piece)
    return whole.dim_min(0), whole.dim_max(0)


def _value(function: isl.PwAff, t: int) -> int | None:
    context = function.get_ctx()
    point = isl.Point.zero(function.get_domain_space()).set_coordinate_val(isl.dim_type.set, 0, isl.Val(t, context))
    value = function.eval(point)
    return None if value.is_nan() else value.to_python()


@lru_cache(maxsize=512)
def on_device(walks: tuple[Walk, ...], device: torch.device) -> Tensor:
    """The walks as (blocks, 4) of int32. Kept: a captured CUDA graph may hold its address."""
    return lasting(lambda: torch.tensor(walks, dtype=torch.int32, device=device).view(-1, 4), device)
