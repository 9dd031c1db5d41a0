"""Implement `attnfx env`: describe the machine for a bug report."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from attnfx import cache
from attnfx.cli.loading import EXIT_CODES
from attnfx.fingerprint import processor, version_of

PACKAGES = ("attnfx", "torch", "triton", "islpy", "transformers")
PATHS = ("ATTNFX_DUMP_DIR", "ATTNFX_TARGET")  # variables whose values may contain the user's paths


@click.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """Describe this machine for a bug report.

    Shows versions, devices, the cache directory and ATTNFX_ variables. The cache directory is the only path shown.
    """
    found = environment()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name, "\n".join(_lines(value)))
    Console().print(table)


def environment() -> dict[str, Any]:
    """Collect the description as JSON values."""
    return {
        "packages": {name: version_of(name) or "not installed" for name in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or torch.version.hip or "not in this build of PyTorch",
        "gpus": _gpus(),
        "cache": str(cache.directory()),
        "variables": {
            name: "(set)" if name in PATHS and value != "auto" else value
            for name, value in sorted(os.environ.items())
            if name.startswith("ATTNFX_") and name != "ATTNFX_CACHE_DIR"
        },
    }


def _gpus() -> list[str]:
    found = []
    for n in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(n)
        found.append(f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory >> 20} MiB")
    return found


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{k} {v}" for k, v in value.items()] or ["none"]
    return (value or ["none"]) if isinstance(value, list) else [str(value)]
