"""Compare eager, Inductor and attnfx on four models of the transformers library, with random weights.

Each model runs as its authors wrote it (attn_implementation="eager"). Each measurement has its own process, so that
memory use stays separate. The columns are:

time         the shortest of a few steps after the first, and its ratio to eager's
peak         the peak memory of a step minus the memory in use before it, and its ratio to eager's
difference   the largest difference from eager, relative to the largest value, in outputs or gradients
first        the time of the first step, which compiles
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from apart import once
from measure import give_back_freed_memory, peak_over_base

if TYPE_CHECKING:
    import torch

    import attnfx

BACKENDS = ("eager", "inductor", "attnfx")


@dataclass(frozen=True)
class Case:
    """A model with its batch, for a training step or for inference."""

    title: str
    make: Callable[[bool], tuple[torch.nn.Module, dict[str, torch.Tensor]]]
    train: bool


# -- the models ---------------------------------------------------------------------------------
def gpt2(quick: bool) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens, layers = (128, 1) if quick else (1024, 4)
    config = GPT2Config(n_layer=layers, vocab_size=8192, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config.use_cache = False
    config._attn_implementation = "eager"
    ids = torch.randint(8192, (2, tokens))
    mask = torch.ones_like(ids)
    mask[1, tokens * 3 // 4 :] = 0
    return GPT2LMHeadModel(config), {"input_ids": ids, "attention_mask": mask, "labels": ids}


def bert(quick: bool) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    import torch
    from transformers import BertConfig, BertModel

    tokens, layers = (128, 1) if quick else (512, 12)
    config = BertConfig(num_hidden_layers=layers)
    config._attn_implementation = "eager"
    ids = torch.randint(30522, (2, tokens))
    mask = torch.ones_like(ids)
    mask[1, tokens * 3 // 4 :] = 0
    return BertModel(config), {"input_ids": ids, "attention_mask": mask}


def mistral(quick: bool) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    import torch
    from transformers import MistralConfig, MistralModel

    tokens, layers = (256, 1) if quick else (4096, 4)
    config = MistralConfig(
        hidden_size=512, intermediate_size=1792, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=8192, max_position_embeddings=8192, sliding_window=tokens // 8,
    )  # fmt: skip
    config.use_cache = False
    config._attn_implementation = "eager"
    return MistralModel(config), {"input_ids": torch.randint(8192, (1, tokens))}


def vit(quick: bool) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    import torch
    from transformers import ViTConfig, ViTModel

    height, width, layers = (64, 64, 1) if quick else (768, 816, 3)  # 48 x 51 patches and the class token
    config = ViTConfig(num_hidden_layers=layers, image_size=(height, width))
    config._attn_implementation = "eager"
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(1, 3, height, width)}


CASES = {
    "gpt2": Case("GPT-2, 4 layers, 1024 tokens, padded batch of 2, training step", gpt2, True),
    "bert": Case("BERT-base, 512 tokens, padded batch of 2, inference", bert, False),
    "mistral": Case("Mistral shape, 4 layers, 4096 tokens, window 512, inference", mistral, False),
    "vit": Case("ViT-B width, 3 layers, 2448 patches, training step", vit, True),
}


# -- one measurement, in its own process ----------------------------------------------------------
def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value of all tensors. A small gradient is not compared
    with itself: the gradient of a key's bias, for one, is only rounding error."""
    largest = max(x.abs().max().item() for x in expected.values())
    return max((found[name] - expected[name]).abs().max().item() for name in expected) / largest


def describe(site: attnfx.Site) -> list[str]:
    """Return a site's place, summary, mask and decision."""
    if site.refusal is not None:
        fate = f"kept: {site.refusal}"
    else:
        fate = ": ".join(filter(None, (site.decision.tier, site.decision.reason))) if site.decision else ""
    return [site.where, site.summary(), site.mask, "; ".join((fate, *site.notes))]


def measure(name: str, backend: str, quick: bool, folder: Path) -> dict[str, Any]:
    import logging

    import torch

    logging.disable(logging.WARNING)
    case = CASES[name]
    torch.manual_seed(0)
    model, batch = case.make(quick)
    model.train(case.train)
    run = model if backend == "eager" else torch.compile(model, backend=backend)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(case.train):
            out = run(**batch)
            result = out.loss if "labels" in batch else out.last_hidden_state
            if case.train:
                (result if "labels" in batch else result.square().mean()).backward()
        return {"output": result.detach()}

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    give_back_freed_memory()
    peak, outputs = peak_over_base(step)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    times = []
    while len(times) < 2 or (sum(times) < 5 and len(times) < 20):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    measured = {"first": first, "seconds": min(times), "steps": len(times), "peak": peak, "sites": []}
    if backend == "eager":
        torch.save([outputs, gradients], folder / f"{name}.pt")
        return measured
    expected = torch.load(folder / f"{name}.pt")
    measured["difference"] = max(difference(a, b) for a, b in zip((outputs, gradients), expected) if b)
    if backend == "attnfx":
        import attnfx

        measured["sites"] = [describe(site) for report in attnfx.reports() for site in report.sites]
    return measured


def in_a_process(name: str, backend: str, quick: bool, folder: Path) -> dict[str, Any]:
    """Run `measure` in a fresh interpreter."""
    command = [sys.executable, __file__, "--worker", name, backend, str(folder)] + ["--quick"] * quick
    return once(command, env=os.environ | {"PYTHONWARNINGS": "ignore"})


# -- the display --------------------------------------------------------------------------------
def sites_table(sites: list[list[str]]) -> Table:
    """List the sites. Identical ones, such as the layers of a model, share a row."""
    table = Table(title="attention found by attnfx", title_justify="left", title_style="")
    for column in ("sites", "where", "what", "mask", "decision"):
        table.add_column(column, overflow="fold", no_wrap=column == "where")
    for site, count in Counter(map(tuple, sites)).items():
        table.add_row(str(count), *map(Text, site))
    return table


def results_table(name: str, by_backend: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=CASES[name].title, title_justify="left", title_style="bold")
    table.add_column("", min_width=9)
    for column, width in zip(("time", "ratio", "peak", "ratio", "difference", "first"), (10, 6, 10, 6, 10, 5)):
        table.add_column(column, justify="right", min_width=width)
    eager = by_backend["eager"]
    for backend, r in by_backend.items():
        if "error" in r:
            table.add_row(backend, "[red]failed")
            continue
        known = backend != "eager" and "seconds" in eager
        table.add_row(
            backend,
            f"{r['seconds'] * 1e3:,.0f} ms",
            f"{r['seconds'] / eager['seconds']:.2f} x" if known else "",
            f"{r['peak'] / 2**20:,.0f} MiB",
            f"{r['peak'] / eager['peak']:.2f} x" if known else "",
            f"{r['difference']:.1e}" if known else "",
            f"{r['first']:.0f} s",
            style="bold green" if backend == "attnfx" else "",
        )
    return table


@click.command(help=(__doc__ or "").replace("\n\ntime", "\n\n\b\ntime"))
@click.option("--model", "names", multiple=True, type=click.Choice(list(CASES)), help="Only this model (repeatable).")
@click.option("--quick", is_flag=True, help="Use tiny sizes, to see the display only.")
@click.option("--worker", nargs=3, hidden=True)
def main(names: tuple[str, ...], quick: bool, worker: tuple[str, str, str] | None) -> None:
    if worker:
        name, backend, folder = worker
        print(json.dumps(measure(name, backend, quick, Path(folder))))
        return
    console = Console()
    chosen = list(dict.fromkeys(names)) or list(CASES)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (TimeElapsedColumn(),)
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        whole = progress.add_task("all measurements", total=len(chosen) * len(BACKENDS))
        for name in chosen:
            console.print(f"\n[bold]{CASES[name].title}")
            for backend in BACKENDS:
                task = progress.add_task(f"  {name}, {backend}", total=None)
                r = in_a_process(name, backend, quick, Path(folder))
                results.setdefault(name, {})[backend] = r
                progress.remove_task(task)
                progress.advance(whole)
                if "error" in r:
                    console.print(Text(f"{backend}: failed, {r['error']}", style="red"))
                    continue
                console.print(f"{backend:9}{r['seconds'] * 1e3:8,.0f} ms{r['peak'] / 2**20:8,.0f} MiB over base")
                if r["sites"]:
                    console.print(sites_table(r["sites"]))
    for name, by_backend in results.items():
        console.print()
        console.print(results_table(name, by_backend))
    if any("error" in r for by_backend in results.values() for r in by_backend.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
