"""The backend that `torch.compile(model, backend="attnfx")` finds by its entry point.

It orchestrates: options are checked, the graph is rewritten, a report is filed, and the rest is compiled by Inductor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from attnfx import dumping, report, verify
from attnfx.errors import RefusalError
from attnfx.options import Options
from attnfx.passes.chunks import draws


def attnfx(gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
           mode: str | None = None) -> Callable[..., Any]:  # fmt: skip
    """Compile a Dynamo graph. `options` are those of `Options`; `mode` goes to Inductor.

    Raises OptionError for a bad option, before anything is compiled. A failure inside attnfx is one warning, and the
    graph is compiled without the rewrite; with `strict` it is raised.
    """
    chosen = Options.make(options or {})
    try:
        result = verify.rewritten(gm, example_inputs, chosen)
        dumping.dump(gm, result, chosen)
    except Exception as problem:
        if chosen.strict:
            raise
        warnings.warn(
            f"attnfx failed on a graph and compiles it without the rewrite ({type(problem).__name__}: {problem}); "
            "please report this with ATTNFX_STRICT=1's traceback to the project's issue tracker",
            stacklevel=2,
        )
        return inner(gm, example_inputs, chosen, mode)
    if result.untraceable:
        if chosen.strict:
            raise RefusalError(f"a graph could not be traced: {result.untraceable}")
        warnings.warn(
            f"attnfx could not trace a graph and leaves it to {chosen.inner}: {result.untraceable}", stacklevel=2
        )
    refused = next((s for s in result.report.sites if s.refusal is not None), None)
    if chosen.strict and refused is not None:
        raise RefusalError(f"{refused.where or refused.name}: {refused.refusal}")
    more: dict[str, Any] = {}
    if chosen.memory_budget is not None:
        from attnfx.budgeting import fit

        fitted = fit(gm, example_inputs, chosen, result)
        result, more = fitted.result, {"partitioner": fitted.partitioner, "patches": fitted.patches}
    report.file(result.report)
    return inner(result.gm if result.gm is not None else gm, example_inputs, chosen, mode, **more)


def inner(gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None,
          partitioner: Any = None, patches: Mapping[str, Any] | None = None) -> Callable[..., Any]:  # fmt: skip
    """Hand a graph to the compiler of the rest; `partitioner` says what is saved for the backward pass, `patches` what
    Inductor's configuration is meanwhile."""
    if options.inner == "eager":
        return gm.forward
    from torch._inductor import list_mode_options

    from attnfx.capture import compile_rest

    asked = list_mode_options(mode) if mode and mode != "default" else {}
    if draws(gm):
        asked = {**asked, "triton.cudagraphs": False}
    return compile_rest(gm, list(example_inputs), options.inner, {**asked, **(patches or {})}, partitioner)
