"""Distribute products over the rows, sums and tables that their operands are made of, so that only small ones remain.

    sum(q[.., None, :] * k[.., None, :, :], -1)   becomes   an einsum, also if k has a vector for each pair of rows
    einsum(.., x, y, z)                           becomes   einsums of two operands
    (w / w.sum(-1, keepdim=True)) @ v             becomes   (w @ v) / w.sum(-1, keepdim=True)
    einsum("bhij,bij->bhij", w, mask)             becomes   w * mask[:, None]
    einsum("bnhxy,bxyhc->bnhc", w, v)             becomes   einsum("bnhx,bxhc->bnhc", w.flatten(3), v.flatten(1, 2))
    linear(cat([q[:, :, None].expand(..), k[:, None].expand(..)], -1), w)
                                                  becomes   linear(q, w1)[:, :, None] + linear(k, w2)[:, None]
    q @ table[g(i, j)].mT                         becomes   (q @ table.mT)[.., g(i, j)]

The third holds for weights of a softmax over another dimension than the sum, which a chunk of keys does not know yet,
the fourth and fifth for einsums near a softmax. Each other left side has an operand with a vector for each pair of
rows. The operands are lifted, up to the tensors that they are spread from. If their product is a product of loads, for
each part of a concatenation, then the same loads are multiplied before they are spread. Narrow dtypes are widened where
a sum or another product follows, so that the result is rounded once. Needs `meta["val"]`; changes the graph in place;
promises the same results up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, pairwise
from math import prod
from string import ascii_letters

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import INT, Expr, walk
from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import Facts, written
from attnfx.passes.fx.einsum import MULTIPLYING, einsum
from attnfx.passes.fx.nodes import (
    CATS,
    PRODUCTS,
    Opaque,
    Product,
    argument,
    axis,
    dims,
    is_tensor,
    number,
    op_name,
    spanned,
    take_place,
    value,
)
from attnfx.passes.lift.access import EXPANSIONS, Access, Operand, free, radix, variables
from attnfx.passes.lift.contraction import contraction, factors
from attnfx.passes.lift.emitter import CannotEmit, Emitter, like
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import Lifter, broadcast
from attnfx.passes.lift.parts import product
from attnfx.passes.lift.products import of_scores, of_softmax, reaches_softmax, skip
from attnfx.passes.lift.tables import POINTWISE, VIEWS, Index

aten = torch.ops.aten
LOOKUPS = ("index", "_unsafe_index", "embedding", "index_select")
NARROW = (torch.float16, torch.bfloat16)
Factors = list[tuple[Node, Index]]


def run(graph: Graph) -> int:
    """Distribute each product with such an operand; return how many were distributed."""
    ways = partial(_distributed, lookups=True), partial(_distributed, lookups=False), _flattened, _divided, _multiplied
    products = (n for n in list(graph.gm.graph.nodes) if op_name(n) in (*MULTIPLYING, "sum") and is_tensor(n))
    return sum(_changed(graph, n, ways) for n in products if value(n).is_floating_point())


def _changed(graph: Graph, n: Node, ways: Sequence[Callable[[Graph, Node], Node | None]]) -> bool:
    for how in ways:
        try:
            made = how(graph, n)
        except (Opaque, CannotEmit):
            continue
        if made is not None:
            take_place(like(graph.emitter(n), made, n), n)
            graph.grew()
            return True
    return False


def _distributed(graph: Graph, n: Node, lookups: bool) -> Node | None:
    """Emit a product of the tensors from which its operands are spread; with `lookups`, also of a looked-up table."""
    facts, out, summed = graph.facts, variables(n), op_name(n) == "sum"
    given, reduced = _summed(n, out) if summed else factors(Product(n) if op_name(n) == "linear" else n, out)
    if not lookups and not any(
        op_name(y) in LOOKUPS for y in reach([x for x, _ in given], partial(_opened, facts, True))
    ):
        return None  # nothing to leave as it is
    opened = partial(_opened, facts, lookups)
    spread = {x for x, _ in given if summed or any(op_name(y) in SPREADING for y in reach([x], opened))}
    if not spread and len(given) < 3:
        return None
    inside = {x: opened(x) for x in reach(spread, opened)}
    leaves, within = [x for x in inside if not inside[x]], [x for x in inside if inside[x]]
    if len({facts.regions[x] for x in (n, *within)}) > 1 or any(facts.changed_before(x, n, leaves) for x in leaves):
        return None
    if spread and (facts.casts(n) or not (summed or reaches_softmax(n, anyhow=True))):
        return None  # autocast rounds the operands of a product, but leaves a sum as it is
    lifter = Lifter(facts.written.union(leaves, (x for x, _ in given if x not in spread)))
    cuts = _cuts(within, reduced)
    parts = [[_loads(lifter, *operand, by) for operand in given] for by in cuts]
    products = [[e for loads in part for e in loads] for part in parts]
    operands = products if summed else [[e for loads in of for e in loads] for of in zip(*parts, strict=True)]
    tables = bool(spread) and any(radix(x) is None for loads in products for e in loads for x in e.args)
    if tables and not _tabulated(parts, n, out):
        return None
    if spread and not (tables or any(_paired(loads, out) for loads in operands)):
        if not (summed and len(products) == 1 and _of_edges(n, [x for x, _ in given], products[0], reduced[0])):
            return None
    emit, dtype = graph.emitter(n), value(n).dtype
    for loads, by in zip(products, cuts, strict=True):
        over = {v for r in reduced if r.args[0] is not A.ONE for v in by.get(r, r).free}
        if not over <= free(tuple(x for e in loads for x in e.args)):
            raise Opaque  # the sum repeats its terms
    wide = bool(spread) and dtype in NARROW and (len(products) > 1 or len(products[0]) > 2)
    total = None
    for loads in products:
        made = _product(emit, loads, out, wide)
        total = made if total is None else emit.call(aten.add.Tensor, total, made)
    assert total is not None
    if (bias := argument(n, 2, "bias") if op_name(n) == "linear" else None) is not None:
        total = emit.call(aten.add.Tensor, total, bias)
    if dims(total) != dims(n):
        total = emit.call(aten.expand.default, total, [emit.size(x) for x in dims(n)])
    return emit.call(aten.to.dtype, total, dtype) if wide else total


def _summed(n: Node, out: Index) -> tuple[Factors, list[Expr]]:
    """Return the factors of the product that a sum over one dimension sums, and the variable of that dimension."""
    whole, over = n.args[0], argument(n, 1, "dim")
    over = over if isinstance(over, list | tuple) else [over]
    if not isinstance(whole, Node) or op_name(whole) != "mul" or value(whole).dtype != value(n).dtype:
        raise Opaque
    if len(whole.users) > 1 or len(over) != 1 or not isinstance(over[0], int):
        raise Opaque
    if any(not is_tensor(x) or value(x).dtype != value(n).dtype for x in whole.args):
        raise Opaque
    dim = over[0] % len(dims(whole))
    r = A.var(f"k_{n.name}", dims(whole)[dim])
    after = dim + bool(argument(n, 2, "keepdim", False))
    index = (*out[:dim], r, *out[after:])
    return [(x, broadcast(x, index)) for x in whole.args], [r]  # type: ignore[arg-type,misc]


# -- rows, keys or sums over several dimensions ---------------------------------------------------
def _flattened(graph: Graph, n: Node) -> Node | None:
    """Emit an einsum near a softmax with one dimension in place of several that follow one another wherever they stand:
    in both operands, or in one and the result."""
    if op_name(n) != "einsum" or len((found := einsum(n)).operands) != 2:
        return None
    if not (reaches_softmax(n) or any(map(of_softmax, found.operands))):
        return None
    terms = [*found.terms, found.out]
    groups = {run for term in terms for run in _runs(term, terms) if len(run) > 1}
    summed = any(run not in found.out for run in groups)
    mixed = any(run in term for run in groups for x, term in zip(found.operands, terms) if of_scores(x))
    if not groups or (mixed and not summed):
        return None  # the rows and the keys of scores, whose heads the product mixes, stay apart
    sizes_of = [dict(zip(term, dims(x), strict=True)) for x, term in zip((*found.operands, n), terms, strict=True)]
    if any(size[c] is not other[c] for size, other in combinations(sizes_of, 2) for c in size if c in other):
        return None  # a dimension of size 1 is broadcast
    emit, given = graph.emitter(n), []
    for x, term, size in zip(found.operands, found.terms, sizes_of, strict=False):
        sizes = [A.mul(*(size[c] for c in run)) for run in _runs(term, terms)]
        given.append(emit.call(aten.reshape.default, x, [emit.size(e) for e in sizes]) if len(sizes) < len(term) else x)
    left, right, out = ("".join(run[0] for run in _runs(term, terms)) for term in terms)
    made = emit.call(aten.einsum.default, f"{left},{right}->{out}", given)
    return emit.call(aten.reshape.default, made, [emit.size(e) for e in dims(n)]) if len(out) < len(found.out) else made


def _multiplied(graph: Graph, n: Node) -> Node | None:
    """Emit an einsum near a softmax that sums over nothing as a multiplication of its broadcast operands."""
    near = op_name(n) == "einsum" and (reaches_softmax(n) or any(map(of_scores, n.args[1])))  # type: ignore[arg-type]
    if not near or graph.facts.casts(n):
        return None
    out, emit = variables(n), graph.emitter(n)
    given, reduced = factors(n, out)
    if reduced or len(given) != 2:
        return None
    left, right = (emit.operand(Operand(x, at), list(out)) for x, at in given)
    return emit.call(aten.mul.Tensor, left, right)


def _runs(term: str, terms: Sequence[str]) -> list[str]:
    """Split a term into the longest runs of letters that each other term has as a whole or lacks."""
    runs = [term[:1]] if term else []
    for one, other in pairwise(term):
        having = [t for t in terms if one in t or other in t]
        if len(having) == 2 and all(one + other in t for t in having):
            runs[-1] += other
        else:
            runs.append(other)
    return runs


# -- weights that are divided by their sums -------------------------------------------------------
def _divided(graph: Graph, n: Node) -> Node | None:
    """Emit the division of weights after their product with the values, if one divisor holds for all summed weights,
    which are a softmax over another dimension."""
    facts, out = graph.facts, variables(n)
    found = contraction(n, out) if op_name(n) in PRODUCTS else None
    for c in (found, found.turned) if found is not None else ():
        x, index = c.left, c.left_index
        while op_name(x) in VIEWS:
            x, index = VIEWS[op_name(x)](x, index)
        if op_name(x) not in ("div", "true_divide") or len(x.args) != 2 or not all(map(is_tensor, x.args)):
            continue
        weights, divisor = x.args[0], skip(x.args[1], ("expand", "expand_as", "broadcast_to"))  # type: ignore[arg-type]
        at = broadcast(divisor, index)  # type: ignore[arg-type]
        if dims(weights) != dims(x) or c.reduced.value in free(at) or not _over_another(weights, index, c.reduced):  # type: ignore[arg-type]
            continue
        if written(facts, [x, n]) or facts.regions[x] != facts.regions[n] or facts.casts(n):
            continue
        if len({value(y).dtype for y in (n, x, weights, divisor)}) > 1 or value(n).dtype == torch.float16:
            continue  # the sum of the weights before the division may exceed its range
        emit, sides = graph.emitter(n), [[Access(weights, index)], [Access(c.right, c.right_index)]]  # type: ignore[arg-type]
        made = product(emit, sides, [c.reduced], c.reduced, c.reduced, out)
        return emit.call(aten.div.Tensor, made, emit.operand(Operand(divisor, at), list(out)))  # type: ignore[arg-type]
    return None


def _over_another(x: Node, index: Index, summed: Expr) -> bool:
    """Return whether a value comes from a softmax over another dimension than a variable of its index."""
    while "softmax" not in op_name(x):
        before = x.args[0] if x.args and is_tensor(x.args[0]) else None
        if op_name(x) in VIEWS:
            x, index = VIEWS[op_name(x)](x, index)
        elif op_name(x) in POINTWISE and before is not None and dims(before) == dims(x):  # type: ignore[arg-type]
            x = before  # type: ignore[assignment]
        else:
            return False
    return summed.value not in index[axis(x)].free


# -- the tensors that an operand is made of -------------------------------------------------------
SPREADING = ("mul", *EXPANSIONS, *LOOKUPS)


def _opened(facts: Facts, lookups: bool, x: Node) -> list[Node]:
    """Return the tensors that a node spreads, joins, multiplies for each pair of rows, or with `lookups` looks up; none
    for a leaf."""
    name = op_name(x)
    if x.op != "call_function" or not is_tensor(x) or x in facts.frozen or x in facts.written:
        return []
    given = list(filter(is_tensor, x.all_input_nodes))
    if name == "mul":
        rows = [spanned(skip(a, EXPANSIONS), len(dims(x))) for a in given]
        paired = any(one - other and other - one for one, other in combinations(rows, 2))
        return given if paired and all(value(a).dtype == value(x).dtype for a in given) else []
    if name in VIEWS and "dropout" not in name:
        return given[:1]
    joined = name in CATS and all(len(dims(a)) == len(dims(x)) for a in given)
    return given if joined or (lookups and name in LOOKUPS) else []


def _cuts(within: Sequence[Node], reduced: list[Expr]) -> list[dict[Expr, Expr]]:
    """Return the replacement of the summed variable for each part of a concatenation along it."""
    for x in within:
        if op_name(x) in CATS and len(reduced) == 1:
            dim, (r,) = int(argument(x, 1, "dim", 0)) % len(dims(x)), reduced  # type: ignore[call-overload]
            if dims(x)[dim] is r.args[0]:
                ends = [A.ZERO]
                for part in x.args[0]:  # type: ignore[union-attr]
                    ends.append(A.add(ends[-1], dims(part)[dim]))  # type: ignore[arg-type]
                return [{r: A.add(a, A.var(f"{r.value}_{n}", A.sub(b, a)))} for n, (a, b) in enumerate(pairwise(ends))]
    return [{}]


def _loads(lifter: Lifter, x: Node, index: Index, by: dict[Expr, Expr]) -> list[Expr]:
    """Return the loads whose product an operand is. Raises Opaque for another expression."""
    lifted = rebuild(
        lifter.lift(x, tuple(substitute(e, by) for e in index)), lambda old, args: args[0] if old.op == "half" else None
    )
    loads = list(lifted.args) if lifted.op == "mul" else [lifted]
    if any(e.op != "load" for e in loads):
        raise Opaque
    return loads


def _paired(loads: list[Expr], out: Index) -> bool:
    """Return whether an operand is made of two tensors that each have rows of their own."""
    rows = [free(e.args).intersection(str(v.value) for v in out) for e in loads]
    return any(x - y and y - x for x, y in combinations(rows, 2))


def _of_edges(n: Node, given: Sequence[Node], loads: list[Expr], r: Expr) -> bool:
    """Return whether a sum over `r` multiplies queries, or weights, with a vector for each pair of a batch's rows."""
    read = [free(e.args) for e in loads]
    if max(len(e.args) for e in loads) < 4 or any(r.value not in names for names in read):
        return False
    of_weights = any(map(of_softmax, given)) and not all(map(of_scores, given))
    return of_weights or (reaches_softmax(n) and any(names < max(read, key=len) for names in read))


def _tabulated(parts: list[list[list[Expr]]], n: Node, out: Index) -> bool:
    """Return whether a product looks up rows of a table that has at most half as many rows as there are lookups."""
    loads = [e for part in parts for found in part for e in found]
    places = [(e, d) for e in loads for d, x in enumerate(e.args) if radix(x) is None]
    if len(places) != 1 or len(parts) != 1:
        return False
    ((table, d),) = places
    apart = table.args[d].free.difference(*(free(e.args) for e in loads if e is not table))
    count = prod(number(size) for v, size in zip(out, value(n).shape, strict=True) if v.value in apart)
    return bool(apart) and 2 * number(value(table.value).shape[d]) <= count


# -- emission ---------------------------------------------------------------------------------------
def _product(emit: Emitter, loads: list[Expr], out: Index, wide: bool) -> Node:
    """Emit the sum of the product of the loads over all variables but those of `out`; broadcast along the missing."""
    given: list[tuple[list[Expr], Node]] = []
    place, row = None, None
    for e in loads:
        index = list(e.args)
        for d, x in enumerate(index):
            if radix(x) is None:
                place, index[d] = x, A.var("row", dims(e.value)[d])  # type: ignore[arg-type]
                row = index[d]
        axes = [v for x in index for v, _ in radix(x)[1]]  # type: ignore[index]
        if len(set(axes)) < len(axes):
            raise CannotEmit("an operand is read along its diagonal")
        node = emit.operand(Operand(e.value, tuple(index)), axes)  # type: ignore[arg-type]
        given.append((axes, emit.call(aten.to.dtype, node, torch.float32) if wide else node))
    kept = [v for v in out if any(v in axes for axes, _ in given)]
    made = _by_pairs(emit, given, kept if row is None else [*kept, row])
    if place is not None and row is not None:
        apart = [v for v in out if v.value in place.free and v not in kept]
        made, kept = _looked_up(emit, made, place, row, [*kept, *apart]), [*kept, *apart]
    return emit.operand(Operand(made, tuple(kept)), list(out))


def _looked_up(emit: Emitter, x: Node, place: Expr, row: Expr, axes: list[Expr]) -> Node:
    """Emit the elements of `x` at `place`, in the last of its dimensions, which `axes` lacks."""
    loads = [e for e in walk(place) if e.op == "load"]
    if len(loads) != 1 or place.kind != INT:
        raise CannotEmit("a place is computed from several tensors")
    at = emit.operand(Operand(loads[0].value, loads[0].args), axes)  # type: ignore[arg-type]
    if place is A.where(A.ge(loads[0], A.ZERO), loads[0], A.add(loads[0], row.args[0])):  # counted from the end
        turned = emit.call(aten.add.Tensor, at, emit.size(row.args[0]))
        at = emit.call(aten.where.self, emit.call(aten.ge.Scalar, at, 0), at, turned)
    elif place is not loads[0]:
        raise CannotEmit("a place is computed from another one")
    sizes = [emit.size(v.args[0]) for v in axes]
    if len(dims(x)) < len(axes):
        for _ in range(len(axes) - len(dims(x))):
            x = emit.call(aten.unsqueeze.default, x, -2)
        x = emit.call(aten.expand.default, x, [*sizes[:-1], -1])
    return emit.call(aten.gather.default, x, -1, emit.call(aten.expand.default, at, sizes))


def _by_pairs(emit: Emitter, given: list[tuple[list[Expr], Node]], out: list[Expr]) -> Node:
    """Emit a product by einsums of two operands, starting with the pair whose result saves the most memory, as
    opt_einsum's greedy search does."""
    sizes = {v: number(size) for axes, x in given for v, size in zip(axes, value(x).shape, strict=True)}
    letters = dict(zip(sizes, ascii_letters, strict=False))
    if len(letters) < len(sizes):
        raise CannotEmit("a product has more dimensions than einsum has letters")

    def result(pair: Sequence[int]) -> list[Expr]:
        needed = {*out}.union(*(axes for k, (axes, _) in enumerate(given) if k not in pair))
        both = dict.fromkeys(v for k in pair for v in given[k][0])
        return out if len(given) == len(pair) else [v for v in both if v in needed]

    def growth(pair: Sequence[int]) -> int:
        made, *before = (prod(sizes[v] for v in axes) for axes in (result(pair), *(given[k][0] for k in pair)))
        return made - sum(before)

    while len(given) > 1 or given[0][0] != out:
        pair = min(combinations(range(len(given)), min(2, len(given))), key=growth)
        made = result(pair)
        *terms, of = ("".join(letters[v] for v in axes) for axes in (*(given[k][0] for k in pair), made))
        node = emit.call(aten.einsum.default, f"{','.join(terms)}->{of}", [given[k][1] for k in pair])
        given = [other for k, other in enumerate(given) if k not in pair] + [(made, node)]
    return given[0][1]
