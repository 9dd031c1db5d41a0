"""Respell a line of the user's code as the nearest one that is rewritten, by an edit of its syntax tree.

Each edit returns the line as it should be written, or "" if the line does not contain the form that it changes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

Facts = Mapping[str, str]
DIM_FIRST = ("softmax", "sum", "mean", "cumsum", "sort")  # operators whose first number is a dimension
LAST = ast.UnaryOp(ast.USub(), ast.Constant(1))  # the dimension -1


def respell(code: str, source: str, facts: Facts) -> str:
    """Return the line `source` of a refused site, edited as its code advises; "" if it cannot be edited."""
    edit = EDITS.get(code)
    if edit is None or not source:
        return ""
    try:
        tree = ast.parse(source.strip())
    except SyntaxError:  # a part of a statement that covers several lines
        return ""
    if len(tree.body) != 1:  # several statements, or a comment
        return ""
    edited = edit(tree, facts)
    return ast.unparse(tree) if edited else ""


JOINS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack")


def _calls(tree: ast.Module, name: str) -> list[ast.Call]:
    """Return the calls of a method or function of this name."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return [c for c in calls if getattr(c.func, "attr", getattr(c.func, "id", "")) == name]


def _along(call: ast.Call, name: str) -> bool:
    """Let an operator run over the last dimension instead of another one; return whether that is a change."""
    for keyword in call.keywords:
        if keyword.arg == "dim":
            before, keyword.value = _number(keyword.value), LAST
            return before not in (None, -1)
    for n, given in enumerate(call.args):
        before = _number(given)
        if before is not None and (before < 0 or name in DIM_FIRST):
            call.args[n] = LAST
            return before != -1
    return False


def _number(x: ast.expr) -> int | None:
    try:
        found = ast.literal_eval(x)
    except ValueError:
        return None
    return found if isinstance(found, int) else None


def _over_keys(tree: ast.Module, facts: Facts) -> bool:
    """Edit the operator that the facts name, and a sum, to run over the keys."""
    names = (facts.get("operator", ""), "softmax", "sum")
    return any([_along(c, name) for name in names for c in _calls(tree, name)])


def _of_each_row(tree: ast.Module, facts: Facts) -> bool:
    """Edit a reduction of a whole tensor to one of each row, an operator along the queries to one along the keys."""
    name = facts.get("operator", "")
    found = _calls(tree, name) if name not in JOINS else []  # along the keys, a join has another shape
    for call in found:
        if not call.args and not call.keywords:
            call.args, call.keywords = [LAST], [ast.keyword("keepdim", ast.Constant(True))]
            return True
    return any([_along(c, name) for c in found])


def _out_of_place(tree: ast.Module, facts: Facts) -> bool:
    """Edit `x.add_(y)` and `x += y` to assignments of a new tensor."""
    (statement,) = tree.body
    if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        value: ast.expr = ast.BinOp(ast.Name(statement.target.id), statement.op, statement.value)
        tree.body = [ast.Assign([statement.target], value, lineno=1)]
        return True
    call = getattr(statement, "value", None)
    if not (isinstance(statement, ast.Expr) and isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return False
    written, name = call.func.value, call.func.attr
    if not isinstance(written, ast.Name) or not name.endswith("_"):
        return False
    call.func.attr = name.removesuffix("_")
    tree.body = [ast.Assign([ast.Name(written.id)], call, lineno=1)]
    return True


def _sum_apart(tree: ast.Module, facts: Facts) -> bool:
    """Edit an einsum over the keys and other dimensions to one over the keys, and sum its result."""
    for holder in ast.walk(tree):
        for name, child in ast.iter_fields(holder):
            if isinstance(child, ast.Call) and child in _calls(tree, "einsum") and child.args:
                made = _einsum(child, facts)
                if made is not None:
                    setattr(holder, name, made)
                    return True
    return False


def _einsum(call: ast.Call, facts: Facts) -> ast.expr | None:
    equation = call.args[0]
    text = equation.value if isinstance(equation, ast.Constant) else None
    if not isinstance(text, str) or "->" not in text or "." in text:
        return None
    given, out = text.replace(" ", "").split("->")
    terms = given.split(",")
    summed = [c for c in dict.fromkeys(given.replace(",", "")) if c not in out]
    if len(terms) != 2 or len(summed) < 2 or any(len(set(t)) != len(t) for t in terms):
        return None
    keys = next((c for c in reversed(terms[0]) if c in summed and c in terms[1]), "")
    others = [c for c in terms[0] if c in summed and c != keys]
    if not keys or len(others) != len(summed) - 1:
        return None
    whole = "".join(c for c in terms[0] if c != keys) + "".join(c for c in out if c not in terms[0])
    left = [c for c in whole if c not in others]
    if "".join(left) != out:
        return None
    dims = [whole.index(c) for c in others]
    call.args[0] = ast.Constant(f"{given}->{whole}")
    which = ast.Constant(dims[0]) if len(dims) == 1 else ast.Tuple([ast.Constant(d) for d in dims])
    return ast.Call(ast.Attribute(call, "sum"), [which], [])


EDITS: dict[str, Callable[[ast.Module, Facts], bool]] = {
    "softmax_dim": _over_keys,
    "normaliser": _over_keys,
    "rows_mixed": _of_each_row,
    "mutated": _out_of_place,
    "contraction": _sum_apart,
}
