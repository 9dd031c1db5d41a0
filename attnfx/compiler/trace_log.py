"""Write the progress on a graph to the log and to PyTorch's structured trace."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch._logging._internal import trace_structured
from torch.fx import GraphModule

from attnfx.report.records import Site


def readable(gm: GraphModule) -> str:
    return gm.print_readable(print_output=False)


def publish(name: str, text: Callable[[], str], encoding: str = "string") -> None:
    """Add a text to PyTorch's structured trace (TORCH_TRACE, tlparse); `text` is called only if tracing is on."""
    trace_structured("artifact", metadata_fn=lambda: {"name": f"attnfx_{name}", "encoding": encoding}, payload_fn=text)


def traces() -> bool:
    """Return whether PyTorch's structured trace is on."""
    return bool(logging.getLogger("torch.__trace").handlers)


def said(site: Site) -> str:
    """Describe the outcome for a site in one log line."""
    if site.refusal is not None:
        return f"kept: {site.refusal}"
    made = site.decision
    return "" if made is None else f"{made.tier} {f'[{made.code}] ' if made.code else ''}{made.reason}".strip()
