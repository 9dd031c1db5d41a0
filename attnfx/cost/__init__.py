"""Predict the cost of a site on each tier and choose one."""

from attnfx.cost.gpu import activation, summary
from attnfx.cost.query import Question
from attnfx.cost.row_chunks import COMPILED, Rows, live_share
from attnfx.cost.row_chunks import KERNELS as ROW_KERNELS
from attnfx.cost.select import evaluate, line, select, select_rows

__all__ = [
    "COMPILED",
    "ROW_KERNELS",
    "Question",
    "Rows",
    "activation",
    "evaluate",
    "line",
    "live_share",
    "select",
    "select_rows",
    "summary",
]  # fmt: skip
