"""Which tier a site gets, and what it is predicted to cost."""

from attnfx.cost.decide import decide, decide_rows, evaluate, line
from attnfx.cost.gpu import summary
from attnfx.cost.question import Question

__all__ = ["Question", "decide", "decide_rows", "evaluate", "line", "summary"]
