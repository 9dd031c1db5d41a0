"""Implement `dump_dir`: write every stage of every graph to numbered folders."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from torch.fx import GraphModule

from attnfx.compiler.pipeline import Result
from attnfx.compiler.trace_log import readable
from attnfx.kernels.flash import tier
from attnfx.options import Options


def dump(gm: GraphModule, result: Result, options: Options) -> Path | None:
    """Write a graph's stages and report to a new folder `graph_N` under `dump_dir`, and return the folder.

    The folder holds the graph as Dynamo captured it, and its code after each pass that changed it. The traced, lifted
    and rewritten stages are there as text, DOT and GraphML; the report, with the decisions, as text and JSON. Each site
    adds its spec and the code generated for its kernel. Existing files are never overwritten.
    """
    if options.dump_dir is None:
        return None
    options.dump_dir.mkdir(parents=True, exist_ok=True)
    folder = _new_folder(options.dump_dir)
    report = result.report
    (folder / "0_dynamo.py").write_text(readable(gm))
    for n, (name, stage) in enumerate(report.stages.items(), 1):
        (folder / f"{n}_{name}.txt").write_text(stage.listing())
        if stage.text:
            (folder / f"{n}_{name}.py").write_text(stage.text)
        stage.to_dot(folder / f"{n}_{name}.dot")
        stage.to_graphml(folder / f"{n}_{name}.graphml")
    (folder / "passes").mkdir()
    for n, (name, text) in enumerate(result.passes, 1):
        (folder / "passes" / f"{n:02}_{name}.py").write_text(text)
    (folder / "report.txt").write_text(f"{report}\n")
    (folder / "report.json").write_text(report.to_json())
    for site in report.sites:
        if site.spec is not None:
            (folder / f"{site.name}.json").write_text(site.spec.to_json())
            (folder / f"{site.name}.txt").write_text(f"{site.where}\n{site.mask}\n{site.spec}\n")
            if site.decision is not None and site.decision.tier in ("flash", "decode"):
                (folder / f"{site.name}.triton.py").write_text(tier.source(site.spec))
    return folder


def _new_folder(parent: Path) -> Path:
    """Create the first free `graph_N`; another process may take one at the same time."""
    for n in itertools.count():
        with contextlib.suppress(FileExistsError):
            (parent / f"graph_{n}").mkdir()
            return parent / f"graph_{n}"
    raise AssertionError
