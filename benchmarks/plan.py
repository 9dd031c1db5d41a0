"""The peak that `attnfx.plan` predicts for a compiled step, against the peak that the allocator's events show.

    python benchmarks/plan.py [--layers 2] [--only NAME] [--output benchmarks/results/plan.json]

Each step is measured in a process of its own: loss and backward pass in training, the last hidden state in inference.
Both numbers are over what is there before the step. Results are written as they come; a step that is there is skipped.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine
from models import Built, build
from peak import peak_over_base
from torch import Tensor, nn

# name, tokens (or pixels; 2448: an image of 2448 tokens), batches
STEPS = [
    ("gpt2", 256, (1, 2, 4)), ("bert", 256, (1, 2, 4)), ("mistral", 512, (1, 2, 4)), ("t5", 512, (1, 2, 4)),
    ("vit", 2448, (1, 2, 3)),
]  # fmt: skip


class Step(nn.Module):
    """A model whose whole step is one call: the loss in training, else the last hidden state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        out = self.model(**batch).last_hidden_state
        return out.square().mean() if self.training else out


def batched(built: Built, batch: int) -> Built:
    """The decoders are built for a batch of one."""
    model, inputs = built
    return model, {k: x if len(x) == batch else x.expand(batch, *x.shape[1:]).contiguous() for k, x in inputs.items()}


def one(name: str, layers: int, size: int, batch: int, train: bool) -> dict[str, Any]:
    """Predicted on meta tensors, then measured."""
    import attnfx

    with torch.device("meta"):
        model, inputs = batched(build(name, layers, size, batch), batch)
    start = time.process_time()
    plan = attnfx.plan(Step(model).train(train), train=train)(**inputs)
    predicted, seconds = plan.choice.peak, time.process_time() - start

    torch.manual_seed(0)
    model, inputs = batched(build(name, layers, size, batch), batch)
    whole = Step(model).train(train)
    run = torch.compile(whole, backend="attnfx", dynamic=False)

    def step() -> Tensor:
        with torch.set_grad_enabled(train):
            out = run(**inputs)
            if train:
                out.backward()
        return out

    del model
    step()
    whole.zero_grad(set_to_none=True)
    measured, _ = peak_over_base(step)
    error = predicted / measured - 1
    return {"predicted": predicted, "measured": measured, "error": round(error, 4), "plan_cpu_s": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan.json")
    parser.add_argument("--job")
    chosen = parser.parse_args()
    if chosen.job:
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        print(json.dumps(one(*json.loads(chosen.job))))
        return
    file: Path = chosen.output
    held = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "steps": {}}
    for name, size, batches in STEPS:
        for batch in batches:
            for train in (False, True):
                key = f"{name}, {chosen.layers} layers, {size}, batch {batch}, {'training' if train else 'inference'}"
                if key in held["steps"] or chosen.only not in (None, name):
                    continue
                job = json.dumps([name, chosen.layers, size, batch, train])
                ran = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True)
                if ran.returncode:
                    print(f"{key}: {ran.stderr[-2000:]}", file=sys.stderr)
                    continue
                held["steps"][key] = found = json.loads(ran.stdout.splitlines()[-1])
                errors = [abs(s["error"]) for s in held["steps"].values()]
                held["error"] = {"mean": round(statistics.mean(errors), 4), "worst": max(errors), "steps": len(errors)}
                file.write_text(json.dumps(held, indent=1) + "\n")
                print(key, found, flush=True)


if __name__ == "__main__":
    main()
