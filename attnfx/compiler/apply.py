"""Apply choices: rewrite the graph that they were made for, or a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from attnfx.compiler.choices import SHIELD, SHIELD_RISKY, Attention, Choice, WholeRows
from attnfx.compiler.context import Context
from attnfx.compiler.faults import Exercised
from attnfx.compiler.find import Found, Place
from attnfx.ir.reach import reach
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

Replaced = list[tuple[Node, Node]]  # each replaced node with its replacement


@dataclass(frozen=True)
class Outcome:
    """The result of a choice: the choice that was applied, the nodes it replaced, and whether the graph changed."""

    choice: Choice
    replaced: Replaced = field(default_factory=list)
    changed: bool = False


def apply(
    graph: Graph,
    choices: Sequence[Choice],
    context: Context,
    after: Callable[[Place, Sequence[Node]], None] | None = None,
) -> list[Outcome]:
    """Apply the choices for a graph and return an outcome for each.

    They are applied from last to first: an operand may be the result of an earlier attention, which is replaced after
    it. Replaced nodes stay in the graph without users. `after` is called with each place when it is done, and with the
    new nodes.
    """
    before = graph.facts
    out: list[Outcome] = []
    for choice in reversed(choices):
        place = choice.place
        together = isinstance(choice.action, WholeRows) and any(
            old is choice.finding.final for o in out for old, _ in o.replaced
        )  # a later attention's region has the same rows, and computes this one too
        run = partial(_carried_out, graph, before, choice, context.exercise)
        outcome = Outcome(choice) if together else context.attempt(place.part, run, Outcome(choice))
        if outcome.choice.action is None:
            outcome = _shielded(graph, outcome.choice)
        if after is not None:
            after(place, graph.made)
        if outcome.changed:
            graph.grew()
        out.append(outcome)
    return out[::-1]


def _carried_out(graph: Graph, before: Any, choice: Choice, exercised: bool) -> Outcome:
    action = choice.action
    if action is None:
        return Outcome(choice)
    try:
        if isinstance(action, WholeRows):
            replaced = replace_region(graph, action.region, operators.ROWS, action.compiled)
            training = action.training
        else:
            replaced = rewrite(
                graph, before, action.match, OPERATORS, ",".join(action.tiers), action.reductions,
                summary=action.summary, fused=action.fused, flex=action.flex,
            )  # fmt: skip
            training = action.match.training
    except CannotEmit as problem:
        if choice.otherwise is not None:
            return _carried_out(graph, before, choice.otherwise, exercised)
        why = refusal("layout", str(problem), choice.finding.final, **problem.facts)
        return Outcome(choice.kept(None, why, SHIELD))
    if exercised:
        _exercise(replaced, training)
    return Outcome(choice, replaced, True)


def _shielded(graph: Graph, choice: Choice) -> Outcome:
    refused = choice.site.refusal
    if choice.shield not in (SHIELD, SHIELD_RISKY) or (refused is not None and refused.code == "mutated"):
        return Outcome(choice)  # in-place writes: do not influence the values that the compiler saves
    if not shield(graph, choice.finding, choice.shield == SHIELD_RISKY):
        return Outcome(choice)
    return Outcome(choice.noted("Inductor's own attention rewriting is switched off here"), changed=True)


def _exercise(replaced: Replaced, training: bool) -> None:
    """Run each new call once on tiny tensors. Raises Exercised if one fails."""

    def following(n: Node) -> list[Node]:
        name = op_name(n)
        other = isinstance(n.target, HigherOrderOperator) or n.target is operators.MASK_SUMMARY
        if other or name in SDPA or name == "sym_size":
            return []
        called = name.startswith("attnfx::")
        return [a for a in n.all_input_nodes if not called or op_name(a) == "getitem"]

    for n in reach([new for _, new in replaced], following):
        if op_name(n).startswith("attnfx::") and n.target is not operators.MASK_SUMMARY:
            try:
                exercise(n.target, _likes(n.args), training and torch.is_grad_enabled())
            except Exception as problem:
                raise Exercised from problem


def _likes(args: Any) -> Any:
    """Replace each tensor in a call's arguments by a `Like`, and each symbolic size by its example value."""

    def like(x: Any) -> Any:
        held = value(x)
        if isinstance(held, torch.Tensor):
            return Like(tuple(map(number, held.shape)), held.dtype, held.device)
        return number(held) if isinstance(held, torch.SymInt) else held

    return tree_map(like, args)


def cut_out(found: Found, choice: Choice) -> GraphModule | None:
    """Cut the site of a choice out as a graph that runs alone. With an action, it is first rewritten in a copy of the
    graph. Returns None if the action cannot be applied."""
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
