"""attnfx: a torch.compile backend that lifts hand-written attention and runs it in linear memory.

torch.compile(model, backend="attnfx")                       rewrites what pays
attnfx.explain(model)(*inputs)                               says what would be done, and why not
attnfx.Target.by_name("h100-sxm")                            a device to decide for
attnfx.plan(model, target="h100-sxm")(*inputs)               what it will take there, and what fits
attnfx.reports()                                             what was done in this process
attnfx.attention(query, key, value, spec, captures)          the operator itself
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attnfx.errors import AttnfxError, BudgetError, OptionError, RefusalError
    from attnfx.explainer import explain
    from attnfx.kernels.operators.attention import attention
    from attnfx.options import Options
    from attnfx.planning.plan import Plan, plan
    from attnfx.report.records import Decision, Refusal, Site
    from attnfx.report.report import Report, reports
    from attnfx.spec import AttentionSpec
    from attnfx.targets import Target

_HOMES = {
    "AttentionSpec": "spec", "AttnfxError": "errors", "BudgetError": "errors", "Decision": "report.report",
    "OptionError": "errors", "Options": "options", "Plan": "planning.plan", "Refusal": "report.report",
    "RefusalError": "errors", "Report": "report.report", "Site": "report.report", "Target": "targets",
    "attention": "kernels.operators.attention", "explain": "explainer", "plan": "planning.plan",
    "reports": "report.report",
}  # fmt: skip

__all__ = [
    "AttentionSpec", "AttnfxError", "BudgetError", "Decision", "OptionError", "Options", "Plan", "Refusal",
    "RefusalError", "Report", "Site", "Target", "attention", "explain", "plan", "reports",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public names are imported when they are first used: an entry point that is never called costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'attnfx' has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"attnfx.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
