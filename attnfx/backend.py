"""Define the backend that `torch.compile(model, backend="attnfx")` finds by its entry point.

The backend checks the options, rewrites the graph, files a report, and compiles the result with Inductor. If attnfx
fails, or the compiler fails on a rewritten graph, the program still runs, without the rewrite.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch._dynamo.exc
from torch.fx import GraphModule

from attnfx.compiler import dump as dumping
from attnfx.compiler import pipeline
from attnfx.compiler.faults import described
from attnfx.compiler.pipeline import Result
from attnfx.errors import AttnfxError, RefusalError
from attnfx.inductor import compile_graph
from attnfx.options import Options
from attnfx.passes.joint.chunk_limit import draws
from attnfx.report import report
from attnfx.report.codes import CODES

_REPORT = "please report this to the project's issue tracker, with the traceback that ATTNFX_STRICT=1 shows"
# Not failures: exceptions that make Dynamo trace a frame again, or skip it.
_SIGNALS = (torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame)


def attnfx(gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
           mode: str | None = None) -> Callable[..., Any]:  # fmt: skip
    """Compile a Dynamo graph. `options` takes the fields of `Options`; `mode` goes to Inductor.

    Raises OptionError for a bad option, before anything is compiled. If attnfx fails, it warns once and compiles the
    graph without the part that failed, or without any rewrite. It does the same if the compiler fails on the rewritten
    graph. With `strict`, both failures are raised, and a refused site raises RefusalError.
    """
    chosen = Options.make(options or {})
    more: dict[str, Any] = {}
    try:
        result = pipeline.run(gm, chosen, example_inputs, exercise=True)
    except _SIGNALS:
        raise
    except Exception as problem:
        if chosen.strict:
            raise
        _warn(f"attnfx failed on a graph, which is compiled without a rewrite ({described(problem)})")
        result = Result(None, report.Report(notes=[f"attnfx failed on this graph: {described(problem)}"]))
    _complain(result, chosen)
    try:
        dumping.dump(gm, result, chosen)
        if chosen.memory_budget is not None:
            from attnfx.planning.fit import fit

            result, more = fit(gm, example_inputs, chosen, result)
    except (AttnfxError, *_SIGNALS):
        raise
    except Exception as problem:
        if chosen.strict:
            raise
        _warn(f"attnfx failed to dump a graph or to fit it to the budget, and skips that step ({described(problem)})")
        result.report.notes.append(
            f"attnfx failed to dump this graph or to fit it to the memory budget: {described(problem)}"
        )
    report.file(result.report)
    if result.gm is None:
        return _compile(gm, example_inputs, chosen, mode, **more)
    return _contained(gm, example_inputs, chosen, mode, result, more)


def _complain(result: Result, options: Options) -> None:
    """Warn about failed parts and untraceable graphs. With `strict`, raise for an untraceable graph or a refusal."""
    if result.untraceable:
        if options.strict:
            raise RefusalError(f"a graph could not be traced: {result.untraceable}. {CODES['untraceable'].edit}")
        warnings.warn(
            f"attnfx could not trace a graph, which {options.inner} compiles unchanged: {result.untraceable}",
            stacklevel=3,
        )
    refused = next((s for s in result.report.sites if s.refusal is not None), None)
    if options.strict and refused is not None:
        raise RefusalError(f"{refused.where or refused.name}: {refused.refusal}")
    if result.faults:
        _warn(f"attnfx failed in a part of a graph, which is compiled without that part ({'; '.join(result.faults)})")


def _contained(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None, result: Result,
    more: Mapping[str, Any],
) -> Callable[..., Any]:  # fmt: skip
    """Compile the rewritten graph; if the compiler fails on it, compile the original graph instead."""
    sites = ", ".join(s.where or s.name for s in result.report.rewritten)

    def backward_failed(problem: Exception) -> None:
        what = f"{options.inner} could not compile the backward pass of the graph with {sites}, which runs uncompiled"
        result.report.notes.append(f"{what}: {described(problem)}")
        if options.strict:
            raise problem
        _warn(f"attnfx: {what} ({described(problem)})")

    assert result.gm is not None
    try:
        return _compile(result.gm, example_inputs, options, mode, **more, backward_failed=backward_failed)
    except _SIGNALS:
        raise
    except Exception as problem:
        if options.strict:
            raise
        compiled = _compile(gm, example_inputs, options, mode)  # raises if the original graph fails too
        what = (
            f"{options.inner} failed on the rewritten graph and compiled the original, without the rewrite of {sites}"
        )
        _warn(f"attnfx: {what} ({described(problem)})")
        result.report.undo("compiler", f"{options.inner} failed on the rewritten graph ({described(problem)})")
        return compiled


def _compile(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None, **more: Any
) -> Callable[..., Any]:
    return compile_graph(gm, example_inputs, options, mode, capturable=not draws(gm), **more)


def _warn(what: str) -> None:
    warnings.warn(f"{what}; {_REPORT}", stacklevel=4)
