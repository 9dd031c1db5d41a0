"""Hold the tables of lifting rules, by the operator's name; the rule modules fill them.

A rule of all tables but VIEWS takes the lifter, a node and the index at which it is read. It returns the expression of
that element, or raises Opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Node

from attnfx.ir.expr import Expr

Index = tuple[Expr, ...]
Rule = Callable[[Any, Node, Index], Expr]
R = TypeVar("R", bound=Callable[..., Any])

POINTWISE: dict[str, Rule] = {}
INDEXING: dict[str, Rule] = {}
REDUCTIONS: dict[str, Rule] = {}
ADDING: dict[str, Rule] = {}  # operators that multiply two operands, and add a third
# Operators that read one tensor at another index, for walks that follow a single value: name -> map of the index.
VIEWS: dict[str, Callable[[Node, Index], tuple[Node, Index]]] = {}


def rule(table: dict[str, Any], *names: str) -> Callable[[R], R]:
    """Register a rule under the names of its operators."""

    def register(fn: R) -> R:
        table.update(dict.fromkeys(names, fn))
        return fn

    return register
