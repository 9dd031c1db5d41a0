"""Implement `attnfx targets`: list and show the devices that attnfx can decide for."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from attnfx.cli.loading import EXIT_CODES
from attnfx.errors import OptionError
from attnfx.options import Options
from attnfx.targets import Target, detect

COLUMNS = {"kind": "kind", "capability": "capability", "bandwidth": "GB/s", "memory": "GiB", "multiprocessors": "SMs"}


@click.group(epilog=EXIT_CODES)
def command() -> None:
    """List the devices that the option `target` knows, or show one."""


@command.command("list", epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def known(as_json: bool) -> None:
    """List the device names with their main properties."""
    found = [Target.by_name(name) for name in Target.names()]
    if as_json:
        click.echo(json.dumps([asdict(t) for t in found], indent=1))
        return
    table = Table("name", *COLUMNS.values(), "TFLOP/s (bfloat16)")
    for t in found:
        cells = [f"{t.memory / 2**30:.0f}" if name == "memory" else f"{getattr(t, name)}" for name in COLUMNS]
        table.add_row(t.name, *cells, f"{t.rate('bfloat16'):g}")
    Console().print(table)


@command.command("show", epilog=EXIT_CODES)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def show(name: str, as_json: bool) -> None:
    """Show every number of a device and its source.

    NAME is a name from the list, the path of a JSON file, or "detect" for this machine's device.
    """
    try:
        found = Options(target=name).target if name not in ("auto", "detect") else detect()
    except OptionError as problem:
        raise click.UsageError(str(problem)) from None
    assert isinstance(found, Target)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    from attnfx.targets.target import UNITS

    table = Table("field", "value", "unit", "source", title=found.name, title_justify="left")
    for field, value in asdict(found).items():
        if field not in ("name", "sources", "note"):
            table.add_row(field, _text(value), UNITS.get(field, ""), found.sources.get(field, ""))
    console = Console()
    console.width = max(100, console.width)
    console.print(table, *filter(None, [found.note]))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:g}" for k, v in value.items())
    if isinstance(value, int | float):
        return f"{int(value):,}" if value == int(value) else f"{value:,.6g}"
    return str(value)
