"""Find uses of an attention's weights and scores outside it: are they needed, and with the attention's own dropout?

Asked when the reductions of each match are known (`passes/match/weight_reductions.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import seeds_of, written_operands
from attnfx.passes.fx.nodes import op_name
from attnfx.passes.match.candidates import Descent
from attnfx.passes.match.results import Match, Reduction


def needed(descent: Descent, matches: Iterable[Match]) -> tuple[dict[Node, Node], frozenset[Node]]:
    """Return the matches whose weights have other readers than attentions and known reductions, as `final` -> a reader,
    and the ends of the matches whose scores have such readers."""
    matches = list(matches)
    ends = {m.final for m in matches} | {r.final for m in matches for r in m.reductions}
    # a call of PyTorch's operator, which is its own anchor, does not expose its weights
    found = ((m.final, read_beside(m.anchors, ends)) for m in matches if m.final not in m.anchors)
    scored = (m.final for m in matches if read_beside(seeds_of(descent.scores, *m.anchors), ends) is not None)
    return {final: n for final, n in found if n is not None}, frozenset(scored)


def drawn_for_others(match: Match, reductions: Iterable[Reduction] = ()) -> Node | None:
    """Return a node through which other values computed from the dropped-out weights leave the graph, or None. They
    would have another dropout mask than the attention."""
    if not match.spec.dropout or not match.anchors:
        return None
    first = min(match.anchors)
    since = reach([match.final], lambda n: [a for a in n.all_input_nodes if not a < first])
    dropped = [n for n in since if n.name == match.draw]
    return read_beside(dropped, {match.final, *(r.final for r in reductions)})


def read_beside(starts: Iterable[Node], ends: set[Node]) -> Node | None:
    """Return a node through which a value computed from the starts leaves the graph without the ends, or None."""
    readers = reach(starts, lambda n: [u for u in n.users if u not in ends and not op_name(u).startswith("sym_")])
    return next((n for n in readers if any(u.op == "output" or written_operands(u) for u in n.users)), None)
