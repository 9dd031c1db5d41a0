"""Implement `attnfx cache`: list or clear the files in the user's cache directory."""

from __future__ import annotations

import json
import shutil

import click
from rich.console import Console
from rich.table import Table

from attnfx import cache

KEPT = {"tuning": "measured candidates (tune)", "calibration": "corrections of the cost model (bench --calibrate)"}
MODULES = "triton"  # the folder of generated kernels


@click.group()
def command() -> None:
    """List or clear the measurements and kernels kept between runs."""


@command.command("path")
def path() -> None:
    """Print the cache directory."""
    click.echo(cache.directory())


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print every entry as JSON.")
def entries(as_json: bool) -> None:
    """List the cache files and their numbers of entries."""
    held = {name: cache.JsonCache(name).entries() for name in KEPT}
    if as_json:
        click.echo(json.dumps(held, indent=1))
        return
    table = Table(title=str(cache.directory()), title_justify="left")
    for column in ("file", "what", "entries"):
        table.add_column(column, overflow="fold")
    for name, what in KEPT.items():
        table.add_row(f"{name}.json", what, str(len(held[name])))
    modules = len(list((cache.directory() / MODULES).glob("*.py")))
    table.add_row(f"{MODULES}/", "generated kernels", str(modules))
    Console().print(table)


@command.command("clear")
@click.argument("names", nargs=-1, type=click.Choice([*KEPT, MODULES]))
def clear(names: tuple[str, ...]) -> None:
    """Delete the named caches, or all. Generated kernels are made again when needed."""
    for name in names or (*KEPT, MODULES):
        if name == MODULES:
            folder = cache.directory() / MODULES
            count = len(list(folder.glob("*.py")))
            shutil.rmtree(folder, ignore_errors=True)
        else:
            count = cache.JsonCache(name).clear()
        click.echo(f"{name}: {count} removed")
