"""Remember where and why Dynamo broke a graph: a break inside an attention leaves its parts in two graphs.

Dynamo attaches the reason to the graph before the break, and names the code after the break
"torch_dynamo_resume_in_f_at_12". The line number connects the two.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass

from torch.fx import GraphModule, Node

LARGEST = 1000  # remembered breaks
_RESUMED = re.compile(r'File "([^"]+)", line \d+, in torch_dynamo_resume_in_.*_at_(\d+)')
_known: dict[tuple[str, str], Break] = {}  # by file and line
_lock = threading.Lock()


@dataclass(frozen=True)
class Break:
    """A graph break: `where` is the user's "file.py:88"; `reason` and `hint` are Dynamo's sentences, "" if unknown."""

    where: str
    reason: str = ""
    hint: str = ""


def ended_by(gm: GraphModule) -> Break | None:
    """Return the break that ends a Dynamo graph, or None. Remembers it for the graph that resumes after it."""
    cause = getattr(gm, "compile_subgraph_reason", None)
    if cause is None or not getattr(cause, "graph_break", False) or not cause.user_stack:
        return None
    last = cause.user_stack[-1]
    hint = re.search(r"Hint: (.*)", cause.reason)
    found = Break(
        f"{os.path.basename(last.filename)}:{last.lineno}",
        next(iter(cause.reason.strip().splitlines()), ""),
        hint[1] if hint else "",
    )
    with _lock:
        for frame in cause.user_stack:  # the callers too: each of them resumes after the call
            _known[(frame.filename, str(frame.lineno))] = found
        while len(_known) > LARGEST:
            del _known[next(iter(_known))]
    return found


def begun_by(node: Node) -> Break | None:
    """Return the break after which a node's graph resumes, or None if the graph starts with the function."""
    found = _RESUMED.search(node.meta.get("stack_trace") or "")
    if found is None:
        return None
    with _lock:
        return _known.get((found[1], found[2]), Break(f"{os.path.basename(found[1])}:{found[2]}"))
