"""Which tier a site gets, and what it is predicted to cost."""

from __future__ import annotations

from collections.abc import Mapping

from attnfx.ir.expr import Expr
from attnfx.ir.interpret import evaluate as _evaluate
from attnfx.options import Options
from attnfx.report import Decision
from attnfx.spec import AttentionSpec


def evaluate(e: Expr, sizes: Mapping[str, int]) -> int:
    """The value of a size expression; sizes that are not known count as 1024."""

    class Known(dict):  # type: ignore[type-arg]
        def __missing__(self, key: str) -> int:
            return 1024

    return int(_evaluate(e, Known(sizes)))


def decide(spec: AttentionSpec, dims: Mapping[str, int], dtype: str, device: str, training: bool, options: Options,
           library: bool) -> Decision:  # fmt: skip
    """A decision for one site. `library` says that the original is PyTorch's own fused operator."""
    if options.rewrite == "always":
        return Decision("library", "auto")
    return Decision("library", "auto")
