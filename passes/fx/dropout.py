"""Remove dropout from a graph, so that two ways to compute the same result can be compared."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Graph, GraphModule, Node

from attnfx.passes.fx.nodes import SDPA, arguments, op_name, set_argument
from attnfx.spec import from_json
from attnfx.spec import rows as rowprogram

DROPOUTS = ("dropout", "dropout_", "feature_dropout")


def drops(gm: GraphModule) -> bool:
    """Return whether an operator of PyTorch applies dropout with a nonzero probability."""
    return any(_probability(n) > 0 for n in gm.graph.nodes)


def _probability(n: Node) -> float:
    if n.op != "call_function" or op_name(n) not in (*DROPOUTS, *SDPA):
        return 0.0
    given = arguments(n)
    return float(given.get("dropout_p", given.get("p"))) if given.get("train", True) else 0.0  # type: ignore[arg-type]


def without_dropout(gm: GraphModule) -> GraphModule:
    """Return a copy in which neither PyTorch's operators nor attnfx's apply dropout."""
    graph, copies = Graph(), {}
    out = graph.graph_copy(gm.graph, copies)
    graph.output(out)
    for n in list(graph.nodes):
        if n.op != "call_function":
            continue
        if op_name(n) in DROPOUTS:
            n.replace_all_uses_with(n.args[0], propagate_meta=False)  # type: ignore[arg-type]
            graph.erase_node(n)
        elif op_name(n) in SDPA and _probability(n):
            set_argument(n, "dropout_p", 0.0)
        elif op_name(n).startswith("attnfx::"):
            given = arguments(n)
            for name, calm in (("spec", _calm_spec), ("program", _calm_rows)):
                if name in given:
                    set_argument(n, name, calm(str(given[name])))
    return GraphModule(gm, graph)


def _calm_spec(text: str) -> str:
    return replace(from_json(text), dropout=0.0).to_json()


def _calm_rows(text: str) -> str:
    program = rowprogram.from_json(text)
    calls = tuple(replace(c, args=(c.args[0], 0.0)) if c.op == "dropout" else c for c in program.calls)
    return replace(program, calls=calls).to_json()
