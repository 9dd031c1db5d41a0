"""Implement `attnfx plan`: predict the memory and time of a model's step on a device, and the sizes that fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from attnfx.cli import output as pages
from attnfx.cli.loading import exit_codes, load, tracing
from attnfx.options import number


@click.command(epilog=exit_codes("no plan fits the memory budget"))
@click.argument("factory")
@click.option("--target", default="auto", show_default=True, help="A device's name, such as h100-sxm, or a JSON file.")
@click.option("--memory-budget", help="Bytes, 16GiB, a fraction of the device's memory such as 0.8, or auto.")
@click.option(
    "--train/--inference", default=None, help="Whether a backward pass follows; by default as in the model's own mode."
)
@click.option("--optimizer", default="none", show_default=True, help="none, sgd, momentum, adam, adamw, adam8bit, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pages.options
def command(factory: str, target: str, memory_budget: str | None, train: bool | None, optimizer: str, as_json: bool,
            html: Path | None, force: bool) -> None:  # fmt: skip
    """Predict a model step's memory and time, and the sizes that fit.

    FACTORY is FILE.py:FACTORY or module:factory and names a function without arguments that returns (model, inputs).
    None of the model's tensor operators runs. If the function builds the model on the "meta" device, nothing is
    allocated at full size.
    """
    from attnfx.planning.plan import plan

    pages.free(html, force)
    built, args, kwargs = load(factory)
    budget = None if memory_budget is None else number(memory_budget)
    with tracing():
        made = plan(built, target=target, memory_budget=budget, train=train, optimizer=optimizer)(*args, **kwargs)
    pages.write(made, html, force)
    click.echo(json.dumps(as_data(made), indent=1) if as_json else str(made))


def as_data(plan: Any) -> dict[str, Any]:
    """Return a plan as JSON values, in bytes and milliseconds."""
    return {
        "target": plan.target.name, "train": plan.train, "budget": plan.budget, "peak_bytes": plan.peak_bytes,
        "reserved_bytes": plan.reserved_bytes, "predicted_ms": round(plan.predicted_ms, 4), "peak": plan.parts(),
        "max_batch": plan.max_batch, "max_length": plan.max_length, "saved": dict(plan.saved),
        "recomputed": dict(plan.recomputed), "notes": plan.notes,
        "sites": [
            {"name": s.name, "where": s.where, "tier": s.decision.tier if s.decision else "kept"} for s in plan.sites
        ],
    }  # fmt: skip
