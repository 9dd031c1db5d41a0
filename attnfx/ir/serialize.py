"""Expressions as text for people, and as JSON lists for specs."""

from __future__ import annotations

import json
import math

from attnfx.ir.expr import Added, Expr, node, walk

_INFIX = {"add": " + ", "mul": " * ", "and": " and ", "or": " or ", "floordiv": " // ", "mod": " % ",
          "lt": " < ", "le": " <= ", "eq": " == "}  # fmt: skip
_TIGHT = {"const", "var", "size", "load", "dot", "prob"}


def show(e: Expr, names: dict[object, str] | None = None) -> str:
    """One line of infix text. `names` gives captures readable names."""
    names = names or {}
    done: dict[Expr, str] = {}
    for at in walk(e):
        done[at] = _show(at, done, names)
    return done[e]


def _show(e: Expr, done: dict[Expr, str], names: dict[object, str]) -> str:
    def inner(a: Expr) -> str:
        text = done[a]
        return f"({text})" if a.op in _INFIX or a.op in ("ge0", "eq0", "not") else text

    if e.op == "const":
        value = e.value
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if e.op in ("var", "size"):
        return str(e.value)
    if e.op in ("dot", "prob"):
        return e.op
    if e.op == "load":
        slot = names.get(e.value, f"c{e.value}" if isinstance(e.value, int) else str(e.value))
        return f"{slot}[{', '.join(done[a] for a in e.args)}]"
    if e.op in _INFIX:
        return _INFIX[e.op].join(inner(a) for a in e.args).replace("+ -", "- ")
    if e.op in ("ge0", "eq0"):
        return f"{inner(e.args[0])} {'>=' if e.op == 'ge0' else '=='} 0"
    if e.op == "not":
        return f"not {inner(e.args[0])}"
    if e.op in ("rsum", "rmax"):
        return f"{e.op[1:]}_{e.value}({done[e.args[0]]})"
    name = str(e.value).split(":")[0] if e.op == "aten" else e.op
    return f"{name}({', '.join(done[a] for a in e.args)})"


def dump(roots: list[Expr]) -> list:
    """JSON-ready: [nodes, root numbers], each node [op, kind, value, operand numbers]."""
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
    """The inverse of `dump`."""
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
