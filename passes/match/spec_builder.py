"""Build a spec over canonical variables from operands and a normalized weight.

A `Reader` takes `Parts`, whose indices are over the dimensions of some node. It chooses the nodes at which to read the
operands, and splits the batch axes accordingly. It returns a `Reading`: the spec with its captures, and the operands
over the axes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from attnfx import spec as S
from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import FLOAT, Expr, walk
from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import Facts, between
from attnfx.passes.fx.nodes import Product, dims, kind_of, label, op_name, refusal, shape_text, slot_node, value
from attnfx.passes.lift.access import (
    Access,
    Operand,
    Split,
    accesses,
    apply_splits,
    best,
    free,
    program_splits,
    split_axes,
    unflatten,
)
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.products import batched, of_batch
from attnfx.passes.lift.tables import REDUCTIONS, Index
from attnfx.passes.match import softmax as N
from attnfx.spec import AttentionSpec, Capture


@dataclass(frozen=True)
class Parts:
    """An attention as read off the graph: indices over the dimensions of `final`, with the operands' nodes still open.
    `pairs` are the operands (node, index) for query, key and value (query and key, for weights without values).
    `found.score` is a program over `dot`. `product` is the node of the scores, if the graph has one."""

    final: Node
    out: Index
    row: Expr
    column: Expr
    width: Expr
    value_width: Expr | None
    pairs: tuple[tuple[Node, Index], ...]
    found: N.Normalised
    product: Node | None = None


@dataclass(eq=False)
class Reading:
    """The parts after the choice of nodes and axes. `operands` correspond to the parts' pairs, and `out_index` to their
    `out`. The batch axes are split into `kv_axes`, which key or value depend on, and `group_axes`, which only the query
    has."""

    spec: AttentionSpec
    captures: list[Node]
    sizes: list[str]
    operands: tuple[Operand, ...]
    kv_axes: list[Expr]
    group_axes: list[Expr]
    out_index: Index

    @property
    def axes(self) -> list[Expr]:
        return [*self.kv_axes, *self.group_axes]


ROLES = ("query", "key", "value")  # of the pairs of `Parts`, in order


class Refused(Exception):
    """A refusal of `code`, with the nodes that failed and the facts that its advice needs."""

    def __init__(self, code: str, message: str, nodes: Iterable[Node] = (), **facts: object):
        super().__init__(message)
        self.refusal = refusal(code, message, *nodes, **facts)


class Reader:
    """A reader of the parts of attentions in one graph."""

    def __init__(self, facts: Facts, lifter: Lifter):
        self.facts, self.lifter = facts, lifter

    def read(self, parts: Parts, sources: tuple[Node, ...] | None = None) -> Reading:
        """Read the parts, with the operands at the nodes `sources` if these are known. Raises Refused."""
        inner = (parts.row, parts.column, parts.value_width)
        batch = [v for v in parts.out if v not in inner and v.args[0] is not A.ONE]
        chosen, splits = self._operands(parts, frozenset(str(v.value) for v in batch), sources)
        found = parts.found
        score = substitute(found.score, {A.DOT: A.mul(chosen[0].factor, chosen[1].factor, A.DOT)})
        weight = A.mul(*(x.factor for x in chosen[2:]), found.weight)
        found = replace(found, score=score, weight=weight)
        programs = [apply_splits(p, splits) for p in (found.score, found.weight, *found.extra)]
        splits = [*splits, *program_splits(programs, frozenset(str(v.value) for v in split_axes(batch, splits)))]
        operands = tuple(Operand(x.node, tuple(apply_splits(i, splits) for i in x.index)) for x in chosen)
        axes = split_axes(batch, splits)
        in_kv = frozenset().union(*(free(x.index) for x in operands[1:]))
        kv_axes = [a for a in axes if a.value in in_kv]
        group_axes = [a for a in axes if a.value not in in_kv]
        if group_axes and not kv_axes and not of_batch(chosen[1].node):
            message = "the keys are one matrix, which the whole batch shares"
            keys, one = shape_text(dims(chosen[1].node)), A.ONE
            wanted = shape_text([*(v.args[0] for v in batch), *(n for n in dims(chosen[1].node) if n is not one)])
            raise Refused("shared_keys", message, [parts.final], keys=keys, wanted=wanted)
        programs = self._rename(found, splits, kv_axes, group_axes, parts.row, parts.column)
        spec, captures, sizes = self._spec(parts, programs, found, [x.node for x in chosen])
        out = tuple(apply_splits(v, splits) for v in parts.out)
        return Reading(spec, captures, sizes, operands, kv_axes, group_axes, out)

    def _operands(
        self, parts: Parts, batch: frozenset[str], sources: tuple[Node, ...] | None
    ) -> tuple[list[Access], list[Split]]:
        """Return the best readings of the operands. Upcasts are undone only if all of them then agree on a dtype."""
        lists = [accesses(self.lifter, *pair) for pair in parts.pairs]
        if sources is not None:
            lists = [[a for a in found if a.node is source] for found, source in zip(lists, sources, strict=True)]
        for upcast in (True, False):
            chosen = [best(candidates, batch, upcast or sources is not None) for candidates in lists]
            for name, c, (node, _) in zip(ROLES, chosen, parts.pairs, strict=False):
                if c is None:
                    raise Refused(
                        "layout", f"the {name} is read at positions that views cannot express", [node], role=name
                    )
            found = [c for c in chosen if c is not None]
            if len({value(a.node).dtype for a, _ in found}) == 1:
                break
        nodes = [access.node for access, _ in found]
        for name, x in zip(ROLES, nodes, strict=False):
            self._unchanged(x, parts.final, nodes, f"the {name}")
        return [access for access, _ in found], _merge(parts.final, [splits for _, splits in found])

    def _rename(self, found: N.Normalised, splits: list[Split], kv: list[Expr], group: list[Expr],
                row: Expr, j: Expr) -> list[Expr]:  # fmt: skip
        """Return the programs over the canonical variables: b is all key axes but the last, h the other batch axes."""
        by: dict[Expr, Expr] = {row: S.I, j: S.J}
        if row.args[0] is A.ONE:
            by[row] = A.ZERO
        batch, heads = batch_and_heads(kv, group)
        unflatten(by, batch, S.B)
        unflatten(by, heads, S.H)
        lengths = {x.args[0]: A.size(name) for x, name in ((j, "S"), (row, "T")) if x.args[0].op == "size"}
        out = []
        for program in (found.score, found.weight, *found.extra):
            program = self._load_reductions(program)
            out.append(substitute(substitute(apply_splits(program, splits), by), lengths))
        return out

    def _load_reductions(self, program: Expr) -> Expr:
        """Replace the reductions outside the normalizer by loads: the graph computes them."""

        def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
            place = self._place(old) if old.op in ("rsum", "rmax", "softmax") else None
            return self.lifter.load(*place) if place is not None else None

        return rebuild(program, change)

    def _place(self, e: Expr) -> tuple[Node, Index] | None:
        """Return the (node, index) that computes a reduction, also if its variable was the softmax's and is now j."""
        found = self.lifter.reductions.get(e)
        if found is not None:
            return found
        here = {v for v in walk(e) if v.op == "var"}
        for other, (node, index) in self.lifter.reductions.items():
            there = {v for v in walk(other) if v.op == "var"}
            if other.op == e.op and len(there - here) == 1 == len(here - there):
                by = dict(zip(there - here, here - there))
                if substitute(other, by) is e:
                    return node, tuple(substitute(x, by) for x in index)
        return None

    def _reductions(self, parts: Parts) -> list[Node]:
        """Return the operators that reduce the scores, apart from the softmax, in the order of the graph."""
        found = between({parts.product}, parts.final) if parts.product is not None else set()
        return sorted(n for n in found if op_name(n) in REDUCTIONS and "softmax" not in op_name(n))

    def _spec(
        self, parts: Parts, programs: list[Expr], found: N.Normalised, sources: Sequence[Node]
    ) -> tuple[AttentionSpec, list[Node], list[str]]:
        """Return the canonical spec, the nodes of its captures, and the names of its symbolic sizes, in order."""
        score, weight, *extra = programs
        if found.normaliser == "none":
            score, weight = A.DOT, substitute(weight, {A.PROB: substitute(score, {A.DOT: A.PROB})})
        slots: dict[object, Capture] = {}
        whole = [e for program in (score, weight, *extra) for e in walk(program)]
        if any(e.op in ("rsum", "rmax", "softmax", "dropout") for e in whole):
            message = "a sum, mean or maximum over a row of scores changes the scores before the softmax"
            raise Refused("reduction", message, [*self._reductions(parts), parts.final])
        for e in whole:
            stray = sorted(e.free - set(S.AXES))
            if stray:
                length = next(v.args[0] for v in walk(e) if v.op == "var" and v.value == stray[0])
                message = f"the scores depend on an index of size {length} beside batch, head, query and key"
                raise Refused("axes", message, [parts.final], length=length)
            if e.op == "load":
                slots[e.value] = self._capture(e.value, parts, programs, sources)
        for program in extra:
            if "j" in program.free or any(e.op == "dot" for e in walk(program)):
                raise Refused("extra", "an added column of the softmax depends on the keys", [parts.final])
        dtype = str(value(parts.final).dtype).removeprefix("torch.")
        compute = "float64" if value(sources[0]).dtype == torch.float64 else "float32"
        draft = AttentionSpec(
            score,
            found.normaliser,
            tuple(extra),
            weight,
            found.dropout,
            found.safe,
            compute,
            dtype,
            tuple(slots.items()),  # type: ignore[arg-type]
        )
        return S.canonical(draft)  # type: ignore[return-value]

    def _capture(self, slot: object, parts: Parts, programs: list[Expr], sources: Collection[Node]) -> Capture:
        """Return the capture for a load of the program. Raises Refused if loading the node is not sound."""
        at = slot_node(slot)
        if isinstance(slot, Product) or (parts.product is not None and self.facts.descends(at, parts.product)):
            message = f"the scores pass through {label(at)}, which cannot be computed for each score by itself"
            if (most := self.lifter.most(at)) is not None:
                message = f"more than {most} operators lead from {label(at)} to the weights"
            product = label(at) if batched(at) else None
            raise Refused("score_used", message, [at, parts.final], most=most, product=product)
        held = value(at)
        if not isinstance(held, torch.Tensor):
            return Capture(FLOAT, 0, False)  # a symbolic number
        if held.dtype.is_complex:
            raise Refused("dtype", f"the scores read {label(at)}, which is complex", [at])
        self._unchanged(at, parts.final, sources, "a tensor that the scores read")
        kind = kind_of(held.dtype)
        taught = kind == FLOAT and at in self.facts.differentiable and _differentiable(at, programs)
        return Capture(kind, held.dim(), taught)

    def _unchanged(self, base: Node, final: Node, sources: Collection[Node], what: str) -> None:
        writer = self.facts.changed_before(base, final, sources)
        if writer is not None:
            message = f"{label(writer)} changes {what} in place before the attention has read it for the last time"
            raise Refused("mutated", message, [writer, base], earlier="move the line before the scores")
        learns = torch.is_grad_enabled() and final in self.facts.differentiable
        if learns and (writer := self.facts.input_writer(base)) is not None:
            # AOTAutograd writes inputs at the end of the forward pass. Its partitioner may save the value from before
            # the write, or recompute a copy from the value after it: the operator would keep more of it than eager
            message = f"{label(writer)} changes an input of the graph in place: {what}, which the backward pass reads"
            raise Refused("mutated", message, [writer, base], mode="torch.no_grad()")


def batch_and_heads(kv: list[Expr], group: list[Expr]) -> tuple[list[Expr], list[Expr]]:
    """Return the axes of the operator's b and h: the last key axis is a head, unless it is the only one."""
    return (kv[:-1], [*kv[-1:], *group]) if len(kv) > 1 else (kv, group)


def _merge(final: Node, lists: list[list[Split]]) -> list[Split]:
    out: list[Split] = []
    for splits in lists:
        for split in splits:
            if split in out:
                continue
            if any(set(split) & set(s) for s in out):
                raise Refused("layout", "query, key and value split a batch dimension in different ways", [final])
            out.append(split)
    return out


def _differentiable(node: Node, programs: list[Expr]) -> bool:
    """Return whether some load of the node is reached without passing a detach."""

    def learns(e: Expr) -> bool:
        return e.op != "detach" and (e.kind == FLOAT or e.op == "where")

    reached = reach(filter(learns, programs), lambda e: filter(learns, e.args))
    return any(e.op == "load" and e.value is node for e in reached)
