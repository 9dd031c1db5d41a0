"""Compare the peak that `attnfx.plan` predicts for a compiled step with the peak from the allocator's events.

    python benchmarks/plan.py [--only NAME] [--again] [--output benchmarks/results/plan.json]

A step computes the loss and the backward pass in training, the last hidden state in inference. Each is measured in its
own process, on one thread. Both peaks exclude memory allocated before the step. Results are written as they come, and
existing ones are kept. With `--again`, they are predicted again, and measured again if the tiers have changed.

There are two tables. "steps" are models of full depth as a user compiles them. "chunks" are the layers of a ViT-B with
2448 tokens whose attention is written whole, or as a loop over chunks of queries. They run as without a compiler
(inner="aot_eager", rewrite="never"), and with attnfx. Without a compiler, the rows for twelve layers are extrapolated
from one and two layers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import apart
import torch
from measure import machine
from models import Built, build
from peak import peak_over_base
from torch import Tensor, nn

import attnfx
from attnfx.report.records import Site


class Case(NamedTuple):
    """A model of `models.py` with its number of layers and tokens, and its compile options as JSON."""

    name: str
    layers: int
    size: int
    batch: int
    train: bool
    options: str = "{}"

    def __str__(self) -> str:
        how = "".join(f", {k}={v}" for k, v in json.loads(self.options).items())
        kind = "training" if self.train else "inference"
        return f"{self.name}, {self.layers} layers, {self.size} tokens, batch {self.batch}, {kind}{how}"


MODELS = [("gpt2", 512), ("bert", 512), ("grouped", 512), ("t5", 512), ("vit", 2448)]
STEPS = [Case(name, 12, size, batch, train) for batch in (1, 2, 4) for name, size in MODELS for train in (False, True)]
UNCOMPILED = json.dumps({"inner": "aot_eager", "rewrite": "never"})
WRITTEN = ("whole", 256, 128, 64)  # queries of a chunk
CHUNKS = [
    Case(f"vit-{chunk}", layers, 2448, 1, True, options)
    for chunk in WRITTEN for options in (UNCOMPILED, "{}") for layers in (1, 2)
]  # fmt: skip


class Step(nn.Module):
    """A model whose forward pass returns the loss in training, else the last hidden state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        out = self.model(**batch).last_hidden_state
        return out.square().mean() if self.training else out


def batched(built: Built, batch: int) -> Built:
    """Expand the inputs to the batch size: `build` makes decoders for a batch of one."""
    model, inputs = built
    return model, {k: x if len(x) == batch else x.expand(batch, *x.shape[1:]).contiguous() for k, x in inputs.items()}


def built(case: Case) -> tuple[Step, dict[str, Tensor]]:
    model, inputs = batched(build(case.name, case.layers, case.size, case.batch), case.batch)
    return Step(model).train(case.train), inputs


def predicted(case: Case) -> dict[str, Any]:
    """Predict the peak with a plan on meta tensors."""
    with torch.device("meta"):
        step, inputs = built(case)
    start = time.process_time()
    plan = attnfx.plan(step, train=case.train, **json.loads(case.options))(**inputs)
    seconds = round(time.process_time() - start, 2)
    return {"predicted": plan.strategy.peak, "planned": _tiers(plan.sites), "plan_cpu_s": seconds}


def _tiers(sites: Iterable[Site]) -> dict[str, int]:
    tiers = [s.decision.tier if s.decision else "refused" for s in sites]
    return {t: tiers.count(t) for t in dict.fromkeys(tiers)}


def measured(case: Case) -> dict[str, Any]:
    """Measure the peak of a real step by the allocator's events, after compilation."""
    torch.manual_seed(0)
    whole, inputs = built(case)
    run = torch.compile(whole, backend="attnfx", dynamic=False, options=json.loads(case.options))

    def step(backward: bool = case.train) -> Tensor:
        with torch.set_grad_enabled(case.train):
            out = run(**inputs)
            if backward:
                out.backward()
        return out

    step(backward=False)  # compiles the backward pass too
    peak, _ = peak_over_base(step)
    return {"measured": peak, "tiers": _tiers(s for r in attnfx.reports() for s in r)}


def answer(what: str, *case: Any) -> dict[str, Any]:
    return {"predicted": predicted, "measured": measured}[what](Case(*case))


def with_errors(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add its error to each row of a table, and return the mean and the worst error."""
    for row in table.values():
        row["error"] = round(row["predicted"] / row["measured"] - 1, 4)
    errors = [abs(row["error"]) for row in table.values()]
    return {"mean": round(statistics.mean(errors), 4), "worst": max(errors), "rows": len(errors)}


def of_twelve(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Extrapolate uncompiled rows from one and two layers to twelve: each layer adds the same bytes."""
    out: dict[str, dict[str, Any]] = {}
    for case in CHUNKS:
        one, two = (table.get(str(case._replace(layers=n))) for n in (1, 2))
        if one and two and case.layers == 1 and case.options == UNCOMPILED:
            row = {k: one[k] + 11 * (two[k] - one[k]) for k in ("predicted", "measured")}
            out[str(case._replace(layers=12))] = row
    return out


def main() -> None:
    options = apart.parser("plan.json")
    options.add_argument("--again", action="store_true")
    chosen = options.parse_args()
    if apart.answered(chosen, answer):
        return
    file: Path = chosen.output
    held = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "steps": {}, "chunks": {}}
    for table, cases in (("steps", STEPS), ("chunks", CHUNKS)):
        rows = held[table]
        for case in cases:
            old = rows.get(str(case), {})
            if chosen.only not in (None, case.name) or (old and not chosen.again):
                continue
            plan = apart.job(__file__, "predicted", *case)
            same = plan is not None and plan["planned"] == old.get("tiers")  # the tiers are still the same
            row = old if same else apart.job(__file__, "measured", *case)
            if row is None or plan is None:
                continue
            rows[str(case)] = row | plan
            held[f"error of {table}"] = with_errors(rows)
            if table == "chunks":
                held["chunks of twelve layers"] = twelve = of_twelve(rows)
                if twelve:
                    with_errors(twelve)
            file.write_text(json.dumps(held, indent=1) + "\n")
            print(case, rows[str(case)], flush=True)


if __name__ == "__main__":
    main()
