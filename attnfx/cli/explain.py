"""Implement `attnfx explain`: report how a model would be rewritten, without running it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import torch
from rich.console import Console
from torch.utils._pytree import tree_map_only

import attnfx
from attnfx.cli import huggingface
from attnfx.cli import output as pages
from attnfx.cli.loading import ARGUMENT_HELP, Refused, exit_codes, load, tracing
from attnfx.options import Rewrite
from attnfx.report.report import Report


def sizes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the size of the model of `--hf` to a command."""
    for name, default, what in (
        ("batch", 1, "sequences or images"), ("length", 512, "tokens of each sequence"), ("heads", 4, "query heads"),
        ("hidden", 256, "width of the hidden states"), ("layers", 2, "layers"),
    ):  # fmt: skip
        command = click.option(
            f"--{name}", type=click.IntRange(1), default=default, show_default=True, help=f"With --hf: {what}."
        )(command)
    return command


@click.command(epilog=exit_codes("a site was refused under --strict"))
@click.argument("factory", required=False, metavar="[FACTORY]")
@click.option(
    "--hf", metavar="MODEL_TYPE", help="Explain a transformers model type with random weights instead, such as llama."
)
@sizes
@click.option("--train", is_flag=True, help="Explain a training step: the model in training mode, with gradients.")
@click.option("--target", default=None, help="The device to decide for; by default the one that holds the tensors.")
@click.option("--rewrite", type=click.Choice(get_args(Rewrite)), default=None, help="The backend's option rewrite.")
@click.option("--strict", is_flag=True, help="Exit with code 3 if a site was refused.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@pages.options
def command(factory: str | None, hf: str | None, train: bool, target: str | None, rewrite: str | None, strict: bool,
            as_json: bool, html: Path | None = None, force: bool = False, **size: int) -> None:  # fmt: skip
    """Report which attention in a model would be rewritten, and why.

    FACTORY is FILE.py:FACTORY or module:factory and names a function without arguments that returns (model, inputs).
    Inputs are a tensor (the only argument), a tuple of arguments, or a dict of keyword arguments. The report is for
    inference unless --train is given. The model's Python code runs once, but none of its tensor operators.

    With --hf, a small model is made, so that the report takes seconds. --layers, --hidden, --heads, --length and
    --batch change its size. It uses transformers' "eager" attention.
    """
    if (factory is None) == (hf is None):
        raise click.UsageError("give either FACTORY or --hf: FACTORY is " + ARGUMENT_HELP)
    pages.free(html, force)
    waiting = Console(stderr=True)
    with waiting.status("building the model"):
        model, args, kwargs = load(factory) if factory is not None else huggingface.made(str(hf), **size)
    options = {k: v for k, v in {"target": target, "rewrite": rewrite}.items() if v is not None}
    args, kwargs = prepared(model, args, kwargs, train)
    with waiting.status("explaining"), tracing(), torch.set_grad_enabled(train):
        report = attnfx.explain(model, **options)(*args, **kwargs)
    pages.write(report, html, force)
    _print(report, as_json)
    refused = [s for s in report.sites if s.refusal is not None]
    if strict and refused:
        raise Refused(f"{refused[0].where or refused[0].name}: {refused[0].refusal}")


def prepared(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], train: bool) -> tuple[Any, Any]:
    """Set a module's mode; in training, make a plain function's floating-point inputs require gradients."""

    def learning(x: torch.Tensor) -> torch.Tensor:
        return x.detach().requires_grad_() if x.is_floating_point() else x

    if isinstance(model, torch.nn.Module):
        model.train(train)
    elif train:
        return tree_map_only(torch.Tensor, learning, (args, kwargs))
    return args, kwargs


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        click.echo(report.to_json())
        return
    console = Console()
    console.print(report) if console.is_terminal else click.echo(str(report))
