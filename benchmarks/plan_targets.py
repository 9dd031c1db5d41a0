"""Plan whole models for GPUs that are not present, time the plans, and verify their limits.

    python benchmarks/plan_targets.py [--only NAME] [--output benchmarks/results/plan_targets.json]

Each model is built at full depth on the "meta" device, and planned for each target in its own process. The limits,
max_batch and max_length, are computed from the sizes in two traces. max_batch is verified with new plans, which have
their own traces and liveness analysis: the plan at the limit must fit, and the plan at one more must not. Seconds are
the process's own CPU time. Results are written as they come; existing plans are skipped.
"""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import apart
import torch
from measure import machine
from models import Built, build, tokens
from plan import Step

TARGETS = ("h100-sxm", "rtx4090", "a100-80gb")
# name -> layers, and tokens (2448: an image of 2448 tokens)
MODELS = {"gpt2": (12, 1024), "bert": (12, 512), "vit": (12, 2448), "t5": (12, 512), "llama": (16, 2048)}
BATCH = 4


def made(name: str, batch: int, length: int | None = None) -> Built:
    """Build a model and its inputs on "meta". "llama" has 1.2e9 parameters, and four heads share a key."""
    import transformers as hf

    layers, size = MODELS[name]
    with torch.device("meta"):
        if name == "llama":
            config = hf.LlamaConfig(
                hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, use_cache=False,
                attn_implementation="eager",
            )  # fmt: skip
            return hf.LlamaModel(config), {"input_ids": tokens(batch, length or size)}
        model, inputs = build(name, layers, size, batch)
        if length is not None:
            inputs = {k: x.new_empty(batch, length) for k, x in inputs.items()}
        return model, inputs


def planned(name: str, target: str, train: bool, batch: int, **how: Any):
    import attnfx

    model, inputs = made(name, batch)
    step = attnfx.plan(Step(model).train(train), target=target, train=train, optimizer="adamw", **how)
    start = time.process_time()
    return step(**inputs), time.process_time() - start


def one(name: str, target: str, train: bool, budget: str | None) -> dict[str, Any]:
    """Make a plan with its limits, and new plans at and above its largest batch."""
    from attnfx.errors import BudgetError

    plan, seconds = planned(name, target, train, BATCH, memory_budget=budget)
    found = {
        "peak_bytes": plan.peak_bytes,
        "predicted_ms": round(plan.predicted_ms, 3),
        "plan_cpu_s": round(seconds, 2),
    }
    start = time.process_time()
    found["max_batch"] = most = plan.max_batch
    found["max_batch_cpu_s"] = round(time.process_time() - start, 2)
    start = time.process_time()
    found["max_length"] = plan.max_length
    found["max_length_cpu_s"] = round(time.process_time() - start, 2)
    found["notes"] = plan.notes
    if most is None:
        return found
    limit = plan.budget if plan.budget is not None else plan.target.memory
    for key, batch in (("at", most), ("above", most + 1)):
        try:
            again, seconds = planned(name, target, train, batch, memory_budget=budget)
            size, fits = again.peak_bytes, again.peak_bytes <= limit
            predicted = plan.bytes_at(batch)
        except BudgetError as problem:
            size, fits, predicted = str(problem), False, plan.bytes_at(batch)
        found[key] = {"batch": batch, "fits": fits, "peak_bytes": size, "bytes_at": predicted,
                      "cpu_s": round(seconds, 2)}  # fmt: skip
    found["agrees"] = found["at"]["fits"] and not found["above"]["fits"]
    return found


def main() -> None:
    chosen = apart.parser("plan_targets.json").parse_args()
    if apart.answered(chosen, one):
        return
    file: Path = chosen.output
    held = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "plans": {}}
    for shift in range(len(TARGETS)):  # early on, plan every model for one of the targets
        for train, (n, name) in product((True, False), enumerate(MODELS)):
            target = TARGETS[(n + shift) % len(TARGETS)]
            kind = "training" if train else "inference"
            key = "{}, {} layers, {}, {}, {}".format(name, *MODELS[name], kind, target)
            if key in held["plans"] or chosen.only not in (None, name):
                continue
            found = apart.job(__file__, name, target, train, None)
            if found is None:
                continue
            held["plans"][key] = found
            file.write_text(json.dumps(held, indent=1) + "\n")
            print(key, found, flush=True)


if __name__ == "__main__":
    main()
