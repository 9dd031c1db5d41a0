"""Serialize expressions as JSON lists, for specs."""

from __future__ import annotations

import json
import math

from attnfx.ir.expr import Added, Expr, node, walk


def dump(roots: list[Expr]) -> list:
    """Convert to JSON-ready lists: [nodes, root numbers], each node [op, kind, value, operand numbers]."""
    number: dict[Expr, int] = {}
    nodes: list = []
    for root in roots:
        for at in walk(root):
            if at not in number:
                number[at] = len(nodes)
                value = at.value
                if type(value) is Added:
                    value = {"added": repr(value)}
                elif isinstance(value, float) and not math.isfinite(value):
                    value = {"float": repr(value)}
                nodes.append([at.op, at.kind, value, [number[a] for a in at.args]])
    return [nodes, [number[r] for r in roots]]


def parse(data: list) -> list[Expr]:
    """Rebuild the expressions from the output of `dump`."""
    nodes, roots = data
    made: list[Expr] = []
    for op, kind, value, operands in nodes:
        if isinstance(value, dict):
            value = Added(value["added"]) if "added" in value else float(value["float"])
        elif op == "const" and kind == "f":
            value = float(value)
        made.append(node(op, kind, tuple(made[a] for a in operands), value))
    return [made[r] for r in roots]


def to_json(roots: list[Expr]) -> str:
    return json.dumps(dump(roots), separators=(",", ":"))
