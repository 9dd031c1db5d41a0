"""Measure training steps under memory budgets: predicted and measured peaks, gradients, and time.

    python benchmarks/budget.py [--only NAME] [--budgets 10] [--output benchmarks/results/budget.json]

Budgets go in equal steps from the predicted peak of the unplanned step to the smallest possible peak. Peaks exclude
memory that exists before the step (parameters and inputs), so "half" is half of the activations and gradients.
Attention is rewritten everywhere, with and without a budget. Gradients are compared with the unplanned step's for the
same seed, as the largest difference over the largest gradient. Times are the CPU time of one thread: planned and
unplanned steps alternate, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine
from models import Built
from peak import peak_over_base
from torch import Tensor, nn

OPTIONS = {"rewrite": "always"}


class Block(nn.Module):
    """Hand-written causal attention and an MLP, with dropout on weights, outputs and hidden values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = self.drop(scores.masked_fill(future, float("-inf")).softmax(-1))
        x = x + self.drop(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.second(x)))))


class Decoder(nn.Module):
    """A small GPT whose forward pass returns the loss."""

    def __init__(self, width: int = 256, heads: int = 4, layers: int = 3, vocabulary: int = 1024):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Encoder(nn.Module):
    """A small BERT of the transformers library, narrower than its base size, whose forward pass returns the loss."""

    def __init__(self, width: int = 256, layers: int = 3):
        super().__init__()
        import transformers as hf

        config = hf.BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width,
            vocab_size=1024, attn_implementation="eager",
        )  # fmt: skip
        self.model = hf.BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask).last_hidden_state.square().mean()


def built(name: str) -> Built:
    torch.manual_seed(0)
    if name == "decoder":
        return Decoder(), {"tokens": torch.randint(1024, (8, 256))}
    mask = torch.ones(8, 256, dtype=torch.int64)
    mask[::2, 192:] = 0
    return Encoder(), {"input_ids": torch.randint(1024, (8, 256)), "attention_mask": mask}


def choices(name: str) -> tuple[Any, list[Any]]:
    """Return a plan of the unplanned step, and the ways to compile it under budgets."""
    import attnfx

    model, inputs = built(name)
    plan = attnfx.plan(model.train(), train=True, memory_budget="20GiB", **OPTIONS)(**inputs)
    assert plan.limited is not None
    return plan, list(plan.limited().ways())


def stepper(name: str, budget: int | None) -> tuple[Callable[[], Tensor], nn.Module, int]:
    """Return a step, its model, and the bytes of parameters and inputs."""
    model, inputs = built(name)
    options = OPTIONS | ({} if budget is None else {"memory_budget": budget})
    run = torch.compile(model.train(), backend="attnfx", dynamic=False, options=options)

    def step() -> Tensor:
        torch.manual_seed(7)
        loss = run(**inputs)
        loss.backward()
        return loss

    held = (*model.parameters(), *model.buffers(), *inputs.values())
    return step, model, sum(x.nbytes for x in held)


def gradients(step: Callable[[], Tensor], model: nn.Module) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    step()
    return [p.grad for p in model.parameters() if p.grad is not None]


def sweep(name: str, count: int, pairs: int, done: Callable[[dict[str, Any]], None]) -> None:
    """Compare steps under budgets, from the unplanned peak to the smallest and at half, with the unplanned step."""
    import attnfx
    from attnfx.planning.peak import fitting, reserve

    plan, ways = choices(name)
    free, free_model, held = stepper(name, None)
    whole, last = plan.strategy.peak, ways[-1]
    least = last.peak + reserve(last, held + last.peak, plan.resident)
    wanted = [held + whole + (least - whole) * n // (count - 1) for n in range(count - 1)] + [held + least]
    expected = gradients(free, free_model)
    free_model.zero_grad(set_to_none=True)
    unplanned, _ = peak_over_base(free)
    for budget in sorted({*wanted, held + whole // 2}, reverse=True):
        start = time.thread_time()
        planned, model, _ = stepper(name, budget)
        found = gradients(planned, model)
        compile_s = time.thread_time() - start
        predicted = fitting(ways, budget, plan.resident, plan.target, True).peak
        (note,) = [n for n in attnfx.reports()[-1].notes if n.startswith("memory_budget")]
        error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(found, expected))
        del found
        model.zero_grad(set_to_none=True)
        measured, _ = peak_over_base(planned)
        times: dict[str, list[float]] = {"free": [], "planned": []}
        for n in range(pairs):
            for which in ("free", "planned") if n % 2 else ("planned", "free"):
                start = time.thread_time()
                (free if which == "free" else planned)()
                times[which].append(time.thread_time() - start)
        ratio = statistics.median(b / a for a, b in zip(times["free"], times["planned"])) if pairs else 0.0
        done({
            "budget": budget - held, "share": round((budget - held) / whole, 4), "predicted": predicted,
            "measured": measured, "error": round(predicted / measured - 1, 4), "unplanned": unplanned,
            "within": measured <= budget - held, "gradient_error": error, "time_ratio": round(ratio, 3),
            "unplanned_s": round(statistics.median(times["free"] or [0.0]), 3), "compile_s": round(compile_s, 1),
            "note": note,
        })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--only")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "budget.json")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    # each budget recompiles the same code; beyond Dynamo's limit it would run eagerly, which must not be measured
    torch._dynamo.config.recompile_limit = 1 << 10
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    file: Path = chosen.output
    held = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "models": {}}
    for name in ("decoder", "encoder"):
        if chosen.only not in (None, name):
            continue
        rows: list[dict[str, Any]] = []
        held["models"][name] = rows

        def done(row: dict[str, Any], rows: list[dict[str, Any]] = rows) -> None:
            rows.append(row)
            file.write_text(json.dumps(held, indent=1) + "\n")
            print(row, flush=True)

        sweep(name, chosen.budgets, chosen.pairs, done)


if __name__ == "__main__":
    main()
