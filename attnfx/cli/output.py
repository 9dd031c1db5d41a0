"""Define the options `--html PATH` and `--force` of the commands that write a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from attnfx.planning.plan import Plan
    from attnfx.report.report import Report


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options `--html` and `--force` to a command."""
    command = click.option("--force", is_flag=True, help="Overwrite the file that --html names.")(command)
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option("--html", type=path, help="Write the report to this path as a self-contained HTML page.")(
        command
    )


def free(html: Path | None, force: bool) -> None:
    """Raise UsageError if a page would overwrite a file. Call this before the work begins."""
    if html is not None and html.exists() and not force:
        raise click.UsageError(f"{str(html)!r} exists; add --force to overwrite it")


def write(drawn: Report | Plan, html: Path | None, force: bool) -> None:
    if html is not None:
        try:
            drawn.to_html(html, force=force)
        except OSError as problem:
            raise click.UsageError(f"the page cannot be written: {problem}") from None
