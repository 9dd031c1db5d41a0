"""Report the softmaxes that did not become attentions, so that every softmax of a graph ends in the report.

Reads a graph that was searched, or a Dynamo graph that was not; changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import descendants, seeds_of
from attnfx.passes.fx.graph_breaks import Break, begun_by
from attnfx.passes.fx.nodes import PRODUCTS, calls, dims, is_tensor, op_name, refusal, shape_text
from attnfx.passes.lift.products import batched
from attnfx.passes.match.matcher import Finder
from attnfx.passes.match.results import Finding
from attnfx.report.records import Refusal

SOFTMAXES = ("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax")
BY_HAND = ("normaliser", "softmax_dim", "columns")  # refusal codes for an exponential divided by some sum
NAMES = ("softmax", "scaled_dot_product", "multi_head_attention")  # parts of names in a Dynamo graph


def others(finder: Finder, anchors: Collection[Node], ended: Break | None) -> Iterator[tuple[Node, Refusal]]:
    """Yield the softmaxes outside `anchors`, each with the reason. `ended` is the break at the graph's end."""
    descent, nodes = finder.descent, finder.gm.graph.nodes
    products = [n for n in nodes if n.op == "call_function" and op_name(n) in (*PRODUCTS, "linear")]
    of_flat = descendants((p for p in products if not batched(p)), descent.known)
    meeting = seeds_of(descent.weights, *products)
    leaving = seeds_of(descent.weights, *(n for n in nodes if n.op == "output"))
    for n in nodes:
        if n.op != "call_function" or op_name(n) not in SOFTMAXES or n in anchors:
            continue
        flat_scores = [s for s in seeds_of(of_flat, n) if dims(s)[-1] in dims(n)]
        begun = begun_by(n)
        if descent.from_scores(n) or n in descent.near:
            if ended is not None and n in leaving:
                yield n, _broken(n, ended, "the weights from the values")
            else:
                yield n, refusal("no_values", "the weights are not multiplied by values", n)
        elif begun is not None and n in meeting and _from_input(n):
            yield n, _broken(n, begun, "the softmax from the scores")
        elif flat_scores and n in meeting:
            *batch, _, keys = dims(n)
            found = [keys, dims(flat_scores[0].all_input_nodes[0])[-1]]
            message = "the keys are one matrix, which the whole batch shares"
            yield n, refusal("shared_keys", message, n, keys=shape_text(found), wanted=shape_text([*batch, *found]))
        else:
            message = "known operators do not lead from a product of queries and keys to this softmax"
            yield n, refusal("not_attention", message, n)


def with_reasons(
    finder: Finder,
    left: list[tuple[Node, Refusal]],
    dropped: list[tuple[Finding, Refusal | None]],
    filed: list[Finding],
) -> list[tuple[Node, Refusal]]:
    """Return `left` without the softmaxes of filed sites, and with the reasons of sites that were dropped earlier:
    these say more than that the weights meet no values. Adds the dropped hand-written softmaxes."""
    reasons = {a: why for f, why in reversed(dropped) if why is not None for a in f.anchors}
    anchors = [a for f in filed for a in f.anchors]
    seen = set(reach(anchors, partial(seeds_of, finder.descent.weights)))  # and softmaxes that these are computed from
    out = [(n, reasons.pop(n, why) if why.code == "no_values" else why) for n, why in left if n not in seen]
    byhand = [f for f, _ in dropped if f.refusal is not None and f.refusal.code in BY_HAND]
    return out + [(f.anchors[0], f.refusal) for f in byhand if f.refusal and not seen & set(f.anchors)]


def unread(gm: GraphModule, code: str, message: str, **facts: object) -> Iterator[tuple[Node, Refusal]]:
    """Yield the softmaxes of a Dynamo graph that was not searched, each with the same refusal."""
    for n, name in calls(gm):
        if any(part in name for part in NAMES):
            yield n, refusal(code, message, n, **facts)


def unread_bodies(gm: GraphModule, read: Collection[str]) -> Iterator[tuple[Node, Refusal]]:
    """Yield the softmaxes in the bodies of higher-order operators that are not named in `read`."""
    for n in gm.graph.nodes:
        if n.op == "call_function" and isinstance(n.target, HigherOrderOperator) and n.target.name() not in read:
            for x in n.all_input_nodes:
                body = getattr(gm, str(x.target), None) if x.op == "get_attr" else None
                if isinstance(body, GraphModule):
                    name = n.target.name()
                    yield from unread(body, "higher_order", f"the body of {name} is not searched", holder=name)


def _broken(n: Node, at: Break, what: str) -> Refusal:
    why = f": {at.reason}" if at.reason else ""
    message = f"a graph break at {at.where} separates {what}{why}"
    return Refusal("graph_break", message, (n.name,), at.hint, at.where, {"place": at.where})


def _from_input(n: Node) -> bool:
    """Return whether a softmax comes from a graph input as large as itself, by operators of one such operand."""
    same = reach([n], lambda x: [a for a in x.all_input_nodes if is_tensor(a) and dims(a) == dims(n)][:1])
    return any(x.op == "placeholder" for x in same)
