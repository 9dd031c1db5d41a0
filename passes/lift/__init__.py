"""Translate FX nodes into index expressions and back: the lifter with its rules, and the emitter.

Importing the package registers the rules.
"""

from attnfx.passes.lift import contraction, indexing, pointwise, reductions, views

__all__ = ["contraction", "indexing", "pointwise", "reductions", "views"]
