"""A torch.compile backend that finds hand-written attention and runs it in linear memory.

torch.compile(model, backend="attnfx")                  compile, rewriting each attention that gains from it
attnfx.explain(model)(*inputs)                          report what would be rewritten, or why not
attnfx.Target.by_name("h100-sxm")                       look up a device to decide for
attnfx.plan(model, target="h100-sxm")(*inputs)          predict time and memory there, and the sizes that fit
attnfx.reports()                                        list the reports of this process
attnfx.attention(query, key, value, spec, captures)     call the attention operator directly
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
    """Import a public name on first use, so that importing attnfx without using it costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'attnfx' has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"attnfx.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
