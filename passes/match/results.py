"""What is found in a graph: an attention, what is read of its weights beside it, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from attnfx.ir.expr import Expr
from attnfx.passes.lift.access import Operand
from attnfx.passes.lift.tables import Index
from attnfx.passes.match.spec_builder import batch_and_heads, every_row_live
from attnfx.report.records import Refusal
from attnfx.spec import AXES, AttentionSpec


@dataclass(eq=False)
class Match:
    """A site found: everything that the rewriter needs. `final` is the node that the operator replaces.

    kv_axes and group_axes are the batch axes; row, column, width, value_width the variables i, j, d, e. `out_index`
    gives, for each dimension of `final`, its index over the axes.
    """

    final: Node
    spec: AttentionSpec
    query: Operand
    key: Operand
    value: Operand
    captures: list[Node]
    sizes: list[str]
    kv_axes: list[Expr]
    group_axes: list[Expr]
    row: Expr
    column: Expr
    width: Expr
    value_width: Expr
    out_index: Index
    draw: object = None  # which of the graph's random draws the dropout is
    reductions: list[Reduction] = field(default_factory=list)
    anchors: list[Node] = field(default_factory=list)
    training: bool = False  # some operand may take a gradient
    chunks: int = 1  # of how many chunks of queries it was made (passes/match/merge_query_chunks.py)
    steps: int = 1  # of how many steps of a loop over heads or batch elements (passes/match/merge_head_loops.py)

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        return self.query, self.key, self.value

    @property
    def read(self) -> list[Node]:
        """The nodes that query, key, value and the captures are read from."""
        return [*(n for x in self.operands for n in x.nodes), *self.captures]

    @property
    def every_row_live(self) -> bool:
        """Whether every row provably has a live key."""
        return every_row_live(self.spec, dict(zip(AXES.values(), self.letters.values(), strict=True)), self.sizes)

    @property
    def axes(self) -> list[Expr]:
        return [*self.kv_axes, *self.group_axes]

    @property
    def letters(self) -> dict[str, list[Expr]]:
        """What the operator's b, h, i and j are made of."""
        batch, heads = batch_and_heads(self.kv_axes, self.group_axes)
        return {"b": batch, "h": heads, "i": [self.row], "j": [self.column]}


@dataclass(frozen=True)
class Reduction:
    """What is read of the weights of a match beside the attention, which an operator computes again.

    `kind` is "sum" (a mean where `count` is given, the number that it is over), "rows" (those from `start` on, as many
    as the axis i has), or what is asked along the axis `over`, of the keys of each row or of the rows of each key:
    "max" or "argmax". "logsumexp" is what the attention's operator gives beside its output, and differentiates.
    `spec`, `captures` and `sizes` describe the weights that are added up, over b, h, i, j of the match; `axes` what
    these are made of; `kept` gives, for each dimension that is left, its index over the axes.
    """

    final: Node
    spec: AttentionSpec
    captures: list[Node]
    sizes: list[str]
    axes: dict[str, list[Expr]]
    kept: Index
    count: Expr | None = None
    kind: str = "sum"
    start: int = 0
    over: str = "j"


@dataclass(eq=False)
class Finding:
    """One attention-like place: a match, or why not. One that is `loose` is an attention only where its rows prove to
    be apart: operators that are not understood stand between its weights and the values."""

    final: Node
    match: Match | None = None
    refusal: Refusal | None = None
    anchors: list[Node] = field(default_factory=list)
    loose: bool = False
