"""Define the results of the search: a match, the reductions of its weights, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import Expr
from attnfx.mask import rows_live
from attnfx.mask.predicate import kept
from attnfx.passes.lift.access import extent
from attnfx.passes.lift.tables import Index
from attnfx.passes.match.spec_builder import Reading, batch_and_heads
from attnfx.report.records import Refusal
from attnfx.spec import AXES, AttentionSpec, I, J


@dataclass(eq=False)
class Match(Reading):
    """A matched site: everything that the rewriter needs. Its operands are query, key and value.

    final                   the node that the operator replaces; `out_index` has an index for each dimension of it
    row, column             the variables i and j
    width, value_width      the variables d and e
    """

    final: Node
    row: Expr
    column: Expr
    width: Expr
    value_width: Expr
    draw: object = None  # the name of the node that applies the dropout
    reductions: list[Reduction] = field(default_factory=list)
    anchors: list[Node] = field(default_factory=list)
    training: bool = False  # some operand may take a gradient
    chunks: int = 1  # number of merged chunks of queries (passes/match/merge_parts.py)
    steps: int = 1  # number of merged steps of a loop over heads or batch elements

    @property
    def query(self) -> Node:
        return self.operands[0].node

    @property
    def read(self) -> list[Node]:
        """Return the nodes that query, key, value and the captures are read from."""
        return [*(n for x in self.operands for n in x.nodes), *self.captures]

    @property
    def letters(self) -> dict[str, list[Expr]]:
        """Return the axes that the operator's b, h, i and j consist of."""
        batch, heads = batch_and_heads(self.kv_axes, self.group_axes)
        return {"b": batch, "h": heads, "i": [self.row], "j": [self.column]}

    @property
    def every_row_live(self) -> bool:
        """Return whether every row provably has a live key. Unless a mask keeps the diagonal, needs constant sizes."""
        keep = kept(self.spec)
        if keep is A.TRUE:
            return True
        extents = {AXES[letter]: extent(axes) for letter, axes in self.letters.items()}
        if extents["T"] is extents["S"] and substitute(keep, {J: I}) is A.TRUE:
            return True
        if self.sizes or any(n.op != "const" for n in extents.values()) or {"b", "h"} & self.spec.score.free:
            return False
        return rows_live(self.spec, {name: int(n.value) for name, n in extents.items()})  # type: ignore[call-overload]


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
