"""Define the command `attnfx`. Each subcommand has a module of its own, imported when it is called."""

from __future__ import annotations

import importlib

import click

COMMANDS = ("bench", "cache", "env", "explain", "plan", "targets")  # each a module with a function `command`


class Commands(click.Group):
    """A command group that imports a command on first use, because importing torch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"{__name__}.{cmd_name}").command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="attnfx")
def main() -> None:
    """Find hand-written attention in a PyTorch model and run it in linear memory."""
