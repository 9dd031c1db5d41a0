"""Define the command `attnfx`. Each subcommand has a module of its own, imported when it is called."""

from __future__ import annotations

import importlib

import click

COMMANDS: dict[str, str] = {
    "bench": "bench:command",
    "cache": "cache:command",
    "env": "env:command",
    "explain": "explain:command",
    "plan": "plan:plan",
    "targets": "targets:command",
}  # name -> "module:function" in this package


class Commands(click.Group):
    """A command group that imports a command on first use, because importing torch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name].split(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="attnfx")
def main() -> None:
    """Find hand-written attention in a PyTorch model and run it in linear memory."""
