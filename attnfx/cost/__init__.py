"""Which tier a site gets, and what it is predicted to cost."""

from attnfx.cost.decide import decide, decide_rows, evaluate, line
from attnfx.cost.question import Question
from attnfx.cost.rows import COMPILED, Rows, live_share

__all__ = ["COMPILED", "Question", "Rows", "decide", "decide_rows", "evaluate", "line", "live_share"]
