"""Format graphs as text, for comparison with golden files."""

import re
from collections.abc import Mapping

import torch
from torch.fx import GraphModule


def text(gm: GraphModule) -> str:
    """Format one line per node: name, shape, operator and operands."""
    lines = []
    for n in gm.graph.nodes:
        if n.op == "output":
            lines.append(f"return {n.args[0]}")
            continue
        held = n.meta.get("val", n.meta.get("example_value"))
        shape = (
            f": {str(held.dtype).removeprefix('torch.')}{list(held.shape)}" if isinstance(held, torch.Tensor) else ""
        )
        target = str(n.target).removeprefix("aten.") if n.op.startswith("call") else n.op
        target = re.sub(r"<(?:built-in )?function (\w+)( at \w+)?>", r"\1", target)
        given = [*map(str, n.args), *(f"{k}={v}" for k, v in n.kwargs.items())] if n.op.startswith("call") else []
        given = ["<spec>" if a.startswith("{") else a for a in given]
        lines.append(f"{n.name}{shape} = {target}({', '.join(given)})")
    return "\n".join(lines)


def whole(gm: GraphModule) -> str:
    """Format a graph, and each body that its higher-order operators call."""
    called = [str(n.target) for n in gm.graph.find_nodes(op="get_attr") if n.users]
    bodies = {name: body for name, body in gm.named_children() if name in called and isinstance(body, GraphModule)}
    return "\n".join([text(gm), *(f"-- {name}\n{text(body)}" for name, body in bodies.items())])


def sections(parts: Mapping[str, str]) -> str:
    """Join named texts into the contents of a golden file."""
    return "".join(f"== {name}\n{body}\n\n" for name, body in parts.items()).rstrip() + "\n"
