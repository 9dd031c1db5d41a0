"""Which tier a site gets, and what it is predicted to cost."""

from attnfx.cost.decide import decide, decide_rows, evaluate, line
from attnfx.cost.gpu import summary
from attnfx.cost.question import Question
from attnfx.cost.rows import COMPILED, Rows, live_share
from attnfx.cost.rows import KERNELS as ROW_KERNELS

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
