"""Carry choices out: rewrite the graph that they were made for, or a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from attnfx.compiler.choices import SHIELD, SHIELD_RISKY, Attention, Choice, WholeRows
from attnfx.compiler.context import Context
from attnfx.compiler.faults import Exercised
from attnfx.compiler.find import Found, Place
from attnfx.kernels import operators
from attnfx.kernels.operators.exercise import Like, exercise
from attnfx.passes.fx.copies import carried
from attnfx.passes.fx.nodes import SDPA, number, op_name, refusal, value
from attnfx.passes.lift.emitter import CannotEmit
from attnfx.passes.lift.graph import Graph
from attnfx.passes.rewrite.attention import Operators, rewrite
from attnfx.passes.rewrite.shield import shield
from attnfx.passes.rewrite.subgraph import base_of, cut
from attnfx.passes.rows.replace_region import replace_region

OPERATORS = Operators(
    operators.ATTENTION, operators.WEIGHTS, operators.LARGEST_WEIGHTS, operators.MASK_SUMMARY
)  # fmt: skip

Replaced = list[tuple[Node, Node]]  # each node that was replaced, and what stands for it


@dataclass(frozen=True)
class Outcome:
    """What came of a choice: the choice that was carried out, what it replaced, and whether the graph changed."""

    choice: Choice
    replaced: Replaced
    changed: bool


def apply(
    graph: Graph, choices: Sequence[Choice], context: Context, after: Callable[[Place], None] | None = None
) -> list[Outcome]:
    """Carry out the choices for a graph, the last first: an operand may be the result of an attention before it, which
    is replaced then. What is replaced stays in the graph, unread. `after` is told of each place when it is done."""
    before = graph.facts
    out = []
    for choice in reversed(choices):
        place = choice.place
        outcome = Outcome(choice, [], False)
        if context.fault(place.part) is None:
            run = partial(_carried_out, graph, before, choice, context.exercise)
            outcome = context.attempt(place.part, run, outcome)
        if outcome.choice.action is None:
            outcome = _shielded(graph, outcome.choice)
        if outcome.changed:
            graph.changed(erased=False)
        if after is not None:
            after(place)
        out.append(outcome)
    return out[::-1]


def _carried_out(graph: Graph, before: Any, choice: Choice, exercised: bool) -> Outcome:
    action = choice.action
    if action is None:
        return Outcome(choice, [], False)
    try:
        if isinstance(action, WholeRows):
            replaced = replace_region(graph, action.region, operators.ROWS, action.compiled)
            training = action.training
        else:
            replaced = rewrite(
                graph, before, action.match, OPERATORS, ",".join(action.tiers), action.reductions,
                summary=action.summary, fused=action.fused,
            )  # fmt: skip
            training = action.match.training
    except CannotEmit as problem:
        if choice.otherwise is not None:
            return _carried_out(graph, before, choice.otherwise, exercised)
        return Outcome(choice.kept(None, refusal("layout", str(problem), choice.finding.final), SHIELD), [], False)
    if exercised:
        _exercise(replaced, training)
    return Outcome(choice, replaced, True)


def _shielded(graph: Graph, choice: Choice) -> Outcome:
    refused = choice.site.refusal
    if choice.shield not in (SHIELD, SHIELD_RISKY) or (refused is not None and refused.code == "mutated"):
        return Outcome(choice, [], False)  # what the compiler saves of a graph that writes in place is left to it alone
    if not shield(graph.gm, choice.finding, choice.shield == SHIELD_RISKY):
        return Outcome(choice, [], False)
    return Outcome(choice.noted("shielded from Inductor's attention patterns"), [], True)


def _exercise(replaced: Replaced, training: bool) -> None:
    """Run each new call once on tiny tensors. Raises Exercised where one fails."""
    stack, seen = [new for _, new in replaced], set()
    while stack:
        n = stack.pop()
        name = op_name(n)
        if n in seen or name in SDPA or name == "sym_size":
            continue
        seen.add(n)
        if not name.startswith("attnfx::"):
            stack.extend(n.all_input_nodes)
            continue
        if n.target is operators.MASK_SUMMARY:
            continue
        try:
            exercise(n.target, _likes(n.args), training and torch.is_grad_enabled())
        except Exception as problem:
            raise Exercised from problem
        stack.extend(a for a in n.all_input_nodes if op_name(a) == "getitem")


def _likes(args: Any) -> Any:
    """The arguments of a call, each tensor by its shape, symbolic sizes as the example has them."""

    def like(x: Any) -> Any:
        held = value(x)
        if isinstance(held, torch.Tensor):
            return Like(tuple(map(number, held.shape)), held.dtype, held.device)
        return number(held) if isinstance(held, torch.SymInt) else held

    return tree_map(like, args)


def cut_out(found: Found, choice: Choice) -> GraphModule | None:
    """The one site of a choice as a graph that runs alone: rewritten in a copy of the graph, or as it is where there is
    no action. None where the action cannot be written."""
    match = choice.finding.match
    assert match is not None
    ends = [match.final, *(r.final for r in match.reductions)]
    graph, operands, captures = found.graph, [base_of(n) for x in match.operands for n in x.nodes], match.captures
    if isinstance(choice.action, Attention):
        graph, copies = graph.copy()
        operands, captures = carried(operands, copies), carried(captures, copies)
        outcome = _carried_out(graph, graph.facts, replace(carried(choice, copies), otherwise=None), False)
        made = dict(outcome.replaced)
        if not made:
            return None
        ends = [made.get(copies[n], copies[n]) for n in ends]
    return cut(graph.gm, list(dict.fromkeys(ends)), operands, captures)
