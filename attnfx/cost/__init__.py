"""Which tier a site gets, and what it is predicted to cost."""

from attnfx.cost.decide import decide, evaluate
from attnfx.cost.question import Question

__all__ = ["Question", "decide", "evaluate"]
