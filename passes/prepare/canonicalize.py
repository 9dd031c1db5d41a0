"""Canonicalize operators: rewrite each as the operator that later passes understand.

    index_put(x, [.., mask], c)                  becomes   masked_fill(x, mask, c)
    sum(x[.., None, :] * y[.., None, :, :], d)   becomes   an einsum
    einsum(.., x, y, z)                          becomes   einsums of two operands

Needs `meta["val"]`, and in-place operators removed (the pass `functionalize`); changes the graph in place; promises the
same results up to rounding.
"""

from __future__ import annotations

from itertools import combinations
from math import prod
from string import ascii_letters, ascii_lowercase
from typing import Any

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.passes.fx.analysis import Facts, written_operands
from attnfx.passes.fx.einsum import einsum
from attnfx.passes.fx.nodes import Opaque, argument, dims, is_tensor, number, op_name, shape, spanned, value
from attnfx.passes.lift.emitter import Emitter
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.products import reaches_softmax

aten = torch.ops.aten
EXPANDS = ("expand", "expand_as")


def run(graph: Graph) -> int:
    """Rewrite each operator that another one expresses; return how many were rewritten."""
    gm = graph.gm
    rules = {
        "index_put": _masked_write, "sum": _broadcast_product, "einsum": _pairs,
    }  # fmt: skip
    found = [n for n in gm.graph.nodes if n.op == "call_function" and op_name(n) in rules and is_tensor(n)]
    if not found:
        return 0
    facts, changed = graph.facts, 0
    for n in found:
        if n in facts.written or written_operands(n):
            continue
        made = rules[op_name(n)](Emitter(gm, n), facts, n)
        if made is not None:
            n.replace_all_uses_with(made, propagate_meta=False)
            gm.graph.erase_node(n)
            changed += 1
    return changed


def _masked_write(emit: Emitter, facts: Facts, n: Node) -> Node | None:
    """Rewrite x[:, mask] = scalar as masked_fill."""
    x, index, number = n.args[:3]
    if argument(n, 3, "accumulate", False) or not isinstance(index, list | tuple):
        return None
    given = [i for i in index if i is not None]
    if len(given) != 1 or index[-1] is None or value(given[0]).dtype != torch.bool or value(number).numel() != 1:
        return None
    if not value(x).is_contiguous() and not reaches_softmax(n):
        return None  # masked_fill returns a contiguous tensor, index_put one with the strides of its operand
    mask = given[0]
    for _ in range(len(shape(x)) - (len(index) - 1) - len(shape(mask))):  # type: ignore[arg-type]
        mask = emit.call(aten.unsqueeze.default, mask, -1)
    if len(shape(number)):  # type: ignore[arg-type]
        number = emit.call(aten.reshape.default, number, [])
    return emit.call(aten.masked_fill.Tensor, x, mask, number)


def _broadcast_product(emit: Emitter, facts: Facts, n: Node) -> Node | None:
    """Rewrite the sum of a product as an einsum, if the two operands broadcast against each other."""
    whole, over = n.args[0], argument(n, 1, "dim")
    over = over if isinstance(over, list | tuple) else [over]
    if op_name(whole) != "mul" or len(whole.users) > 1 or len(over) != 1 or not isinstance(over[0], int):  # type: ignore[union-attr,arg-type]
        return None
    operands = [_unexpanded(facts, x) for x in whole.args[:2]]  # type: ignore[union-attr]
    if not all(is_tensor(x) and value(x).dtype == value(n).dtype for x in operands) or facts.casts(n):
        return None  # autocast leaves a sum as it is, and rounds the operands of an einsum
    if any(facts.changed_before(x, n, operands) for x in operands):
        return None  # the product has read other values
    rank = len(shape(whole))  # type: ignore[arg-type]
    if not value(n).is_floating_point() or facts.regions[whole] != facts.regions[n] or rank > len(ascii_lowercase):  # type: ignore[index]
        return None
    left, right = (spanned(x, rank) for x in operands)
    summed = over[0] % rank
    if summed not in left & right or not (left - right and right - left):
        return None
    letters = [ascii_lowercase[rank - len(shape(x)) : rank] for x in operands]
    out = ascii_lowercase[:summed] + ascii_lowercase[summed + 1 : rank]
    made = emit.call(aten.einsum.default, f"{letters[0]},{letters[1]}->{out}", operands)
    return emit.call(aten.unsqueeze.default, made, summed) if argument(n, 2, "keepdim", False) else made


def _unexpanded(facts: Facts, x: Any) -> Any:
    """Return the tensor that an operand expands; under no_grad, an expansion has no gradient to pass on."""
    while isinstance(x, Node) and op_name(x) in EXPANDS and x not in facts.frozen:
        x = x.args[0]
    return x


def _pairs(emit: Emitter, facts: Facts, n: Node) -> Node | None:
    """Split an einsum of three or more operands into pairs, starting with the pair whose result saves the most memory,
    as opt_einsum's greedy search does."""
    try:
        product = einsum(n)
    except Opaque:
        return None
    letters = "".join(dict.fromkeys("".join(product.terms)))
    if len(product.terms) < 3 or len(letters) > len(ascii_letters):
        return None
    names = str.maketrans(letters, ascii_letters[: len(letters)])  # "..." has become other letters
    inputs, output = [t.translate(names) for t in product.terms], product.out.translate(names)
    sizes: dict[str, int] = {}
    for term, x in zip(inputs, product.operands, strict=True):  # type: ignore[arg-type]
        for letter, size in zip(term, shape(x), strict=True):
            sizes[letter] = max(sizes.get(letter, 1), number(size))
    left: list[tuple[str, Any]] = []
    for term, x in zip(inputs, product.operands, strict=True):  # type: ignore[arg-type]
        single = [d for d, c in enumerate(term) if sizes[c] != 1 and dims(x)[d] is A.ONE]  # broadcast by the einsum
        squeezed = emit.call(aten.squeeze.dims, x, single) if single else x
        left.append(("".join(c for d, c in enumerate(term) if d not in single), squeezed))

    def result(pair: tuple[int, int]) -> str:
        needed = set(output).union(*(t for k, (t, _) in enumerate(left) if k not in pair))
        both = dict.fromkeys(left[pair[0]][0] + left[pair[1]][0])
        return output if len(left) == 2 else "".join(c for c in both if c in needed)

    def growth(pair: tuple[int, int]) -> int:
        made, *given = (prod(sizes[c] for c in term) for term in (result(pair), *(left[k][0] for k in pair)))
        return made - sum(given)

    while len(left) > 1:
        pair = min(combinations(range(len(left)), 2), key=growth)
        made = result(pair)
        (one, x), (two, y) = (left[k] for k in pair)
        node = emit.call(aten.einsum.default, f"{one},{two}->{made}", [x, y])
        left = [other for k, other in enumerate(left) if k not in pair] + [(made, node)]
    return left[0][1]
