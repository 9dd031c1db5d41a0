"""`dump_dir`: every stage of every graph, in numbered folders."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from torch.fx import GraphModule

from attnfx.kernels.flash import tier
from attnfx.options import Options
from attnfx.pipeline import Result, readable


def dump(gm: GraphModule, result: Result, options: Options) -> Path | None:
    """Write the graph as Dynamo made it, the traced and the rewritten one, the report, each site's spec, and what
    was generated for its kernel.

    Gives the folder, a new `graph_N` under `dump_dir`; nothing that is there is overwritten.
    """
    if options.dump_dir is None:
        return None
    options.dump_dir.mkdir(parents=True, exist_ok=True)
    folder = _new_folder(options.dump_dir)
    stages = {"dynamo": readable(gm), **result.stages}
    for n, (name, text) in enumerate(stages.items()):
        (folder / f"{n}_{name}.py").write_text(text)
    (folder / "report.txt").write_text(f"{result.report}\n")
    for site in result.report.sites:
        if site.spec is not None:
            (folder / f"{site.name}.json").write_text(site.spec.to_json())
            (folder / f"{site.name}.txt").write_text(f"{site.where}\n{site.mask}\n{site.spec}\n")
            if site.decision is not None and site.decision.tier in ("flash", "decode"):
                (folder / f"{site.name}.triton.py").write_text(tier.source(site.spec))
    return folder


def _new_folder(parent: Path) -> Path:
    """The first free `graph_N`; another process may take one at the same time."""
    for n in itertools.count():
        with contextlib.suppress(FileExistsError):
            (parent / f"graph_{n}").mkdir()
            return parent / f"graph_{n}"
    raise AssertionError
