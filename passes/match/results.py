"""Define the results of the search: a match, the reductions of its weights, or a refusal."""

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
    """A matched site: everything that the rewriter needs.

    final                   the node that the operator replaces
    kv_axes, group_axes     the batch axes
    row, column             the variables i and j
    width, value_width      the variables d and e
    out_index               for each dimension of `final`, its index over the axes
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
    draw: object = None  # the name of the node that applies the dropout
    reductions: list[Reduction] = field(default_factory=list)
    anchors: list[Node] = field(default_factory=list)
    training: bool = False  # some operand may take a gradient
    chunks: int = 1  # number of merged chunks of queries (passes/match/merge_parts.py)
    steps: int = 1  # number of merged steps of a loop over heads or batch elements

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        return self.query, self.key, self.value

    @property
    def read(self) -> list[Node]:
        """Return the nodes that query, key, value and the captures are read from."""
        return [*(n for x in self.operands for n in x.nodes), *self.captures]

    @property
    def every_row_live(self) -> bool:
        """Return whether every row provably has a live key."""
        return every_row_live(self.spec, dict(zip(AXES.values(), self.letters.values(), strict=True)), self.sizes)

    @property
    def axes(self) -> list[Expr]:
        return [*self.kv_axes, *self.group_axes]

    @property
    def letters(self) -> dict[str, list[Expr]]:
        """Return the axes that the operator's b, h, i and j consist of."""
        batch, heads = batch_and_heads(self.kv_axes, self.group_axes)
        return {"b": batch, "h": heads, "i": [self.row], "j": [self.column]}


@dataclass(frozen=True)
class Reduction:
    """Values that the graph computes from the weights of a match, which an operator computes again without the weights.

    The kinds:

    "sum"              a sum, or a mean over `count` elements
    "rows"             rows of the weights from `start` on, as many as the axis i has
    "max", "argmax"    along `over`: of the keys of each row ("j"), or of the rows of each key ("i")
    "logsumexp"        returned by the attention's own operator beside its output, with a gradient

    `spec`, `captures` and `sizes` describe the reduced weights, over b, h, i, j of the match. `axes` are the axes that
    these consist of. `kept` is the index over the axes for each remaining dimension.
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
    """An attention-like site: a match or a refusal. In a `loose` finding, operators that are not understood lie between
    the weights and the values: it is an attention only if its rows prove to be independent."""

    final: Node
    match: Match | None = None
    refusal: Refusal | None = None
    anchors: list[Node] = field(default_factory=list)
    loose: bool = False
