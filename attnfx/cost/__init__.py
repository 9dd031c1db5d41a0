"""Which tier a site gets, and what it is predicted to cost."""

from attnfx.cost.gpu import summary
from attnfx.cost.query import Question
from attnfx.cost.row_chunks import COMPILED, Rows, live_share
from attnfx.cost.row_chunks import KERNELS as ROW_KERNELS
from attnfx.cost.select import decide, decide_rows, evaluate, line

__all__ = [
    "COMPILED",
    "ROW_KERNELS",
    "Question",
    "Rows",
    "decide",
    "decide_rows",
    "evaluate",
    "line",
    "live_share",
    "summary",
]  # fmt: skip
