"""Shield kept sites from PyTorch's own attention patterns, which rewrite some of them wrongly.

Inductor rewrites code that looks like attention after attnfx, and gets some of it wrong: it ignores the dim that a
softmax runs over, `alpha`, casts, and the order of a key's dims (pytorch#196468, #195320, #172183). These patterns
cannot be switched off alone. So the weights of a kept site pass through `clamp_max(weights, inf)`: this changes no
value, costs nothing in a fused kernel, and no pattern matches across it.
"""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch.fx import Node

from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import between
from attnfx.passes.fx.nodes import PRODUCTS, op_name, value
from attnfx.passes.lift.graph import Graph
from attnfx.passes.match.results import Finding

aten = torch.ops.aten
LARGEST = 200  # nodes from the softmax back to the products


def shield(graph: Graph, finding: Finding, only_risky: bool = False) -> bool:
    """Shield a kept site; return whether the graph changed. `only_risky` skips sites that are not known to go wrong."""
    cone = _cone(finding)
    if only_risky and not any(_risky(n) for n in cone):
        return False
    final = finding.final
    computed = [x for x in final.all_input_nodes if x in cone and x.op == "call_function"]
    operands = [x for x in computed if value(x).dtype.is_floating_point]  # type: ignore[union-attr]
    for x in operands:
        final.replace_input_with(x, graph.emitter(final).call(aten.clamp_max.default, x, math.inf))
    return bool(operands)


def _cone(finding: Finding) -> set[Node]:
    """Return the nodes between the operands of the scores and the weighted values."""
    below = between(set(finding.anchors), finding.final) - {finding.final}

    def before(n: Node) -> list[Node]:
        found = [] if op_name(n) in PRODUCTS else n.all_input_nodes
        return [a for a in found if a.op == "call_function" and a not in below]

    above = set(islice(reach(finding.anchors, before), LARGEST))
    products = (n for n in above if op_name(n) in PRODUCTS)
    return below | above | {x for n in products for x in n.all_input_nodes if op_name(x) == "permute"}


def _risky(n: Node) -> bool:
    name = op_name(n)
    if (name in ("add", "sub", "rsub") and n.kwargs.get("alpha", 1) != 1) or name in ("baddbmm", "einsum"):
        return True
    if name == "permute":
        return any(op_name(u) in PRODUCTS for u in n.users)
    if name in ("softmax", "_softmax"):
        return n.args[1] not in (-1, len(value(n).shape) - 1)  # type: ignore[union-attr]
    if name not in ("to", "_to_copy", "type_as"):
        return False
    before, after = value(n.args[0]).dtype, value(n).dtype
    return before != after and before.is_floating_point and after.is_floating_point
