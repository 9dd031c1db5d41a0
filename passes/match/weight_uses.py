"""What a graph reads of the weights of its attentions beside these: whether the weights are needed, and whether they
must be of the attention's own draw. Asked when the reductions of each match are known
(`passes/match/weight_reductions.py`)."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import written_operands
from attnfx.passes.fx.nodes import op_name
from attnfx.passes.match.results import Match, Reduction


def needed(matches: Iterable[Match]) -> dict[Node, Node]:
    """For the `final` of each match whose weights are read by more than attentions and sums of them: what is read."""
    matches = list(matches)
    ends = {m.final for m in matches} | {r.final for m in matches for r in m.reductions}
    found = ((m, read_beside(m.anchors, ends)) for m in matches if m.final not in m.anchors)  # else it makes no weights
    return {m.final: n for m, n in found if n is not None}


def drawn_for_others(match: Match, reductions: Iterable[Reduction] = ()) -> Node | None:
    """What else is made of the weights that a match drops, which would be of another draw than the attention."""
    names = {match.draw} if match.spec.dropout else set()
    dropped = [n for n in match.final.graph.nodes if n.name in names]
    return read_beside(dropped, {match.final, *(r.final for r in reductions)})


def read_beside(starts: Iterable[Node], ends: set[Node]) -> Node | None:
    """A node through which something of the starts leaves the graph, other than through the ends."""
    readers = reach(starts, lambda n: [u for u in n.users if u not in ends and not op_name(u).startswith("sym_")])
    return next((n for n in readers if any(u.op == "output" or written_operands(u) for u in n.users)), None)
