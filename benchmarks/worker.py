"""Run one measurement in its own process: read a job as JSON from the argument, and print the result as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import give_back_freed_memory, interleaved, peak_over_base
from models import build, generator
from programs import fused, make
from torch import Tensor, nn


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return function if backend == "eager" else torch.compile(function, backend=backend, dynamic=False)


def clock(threads: int) -> Callable[[], float]:
    """Return the clock. With one thread, it is the thread's own time, which excludes other programs."""
    return time.thread_time if threads == 1 else time.perf_counter


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def attention(job: dict[str, Any]) -> dict[str, Any]:
    """Measure attention alone: one function, operands (1, H, T, D). "sdpa" is Inductor on PyTorch's fused attention."""
    torch.manual_seed(0)
    program = make(job["program"], job["T"])
    shape = (1, job["H"], job["T"], job["D"])
    operands = [torch.randn(shape, requires_grad=job["train"]) for _ in range(3)]
    pad, grad = torch.ones(1, job["T"]), torch.randn(shape)

    def call(run: Callable[..., Tensor]) -> Tensor:
        with torch.set_grad_enabled(job["train"]):
            out = run(*operands, pad)
            if job["train"]:
                for x in operands:
                    x.grad = None
                out.backward(grad)
        return out.detach()

    runs = {name: compiled(program, name) for name in job["contenders"] if name != "sdpa"}
    if "sdpa" in job["contenders"]:
        runs["sdpa"] = compiled(fused(job["program"]), "inductor")
    outputs = {name: call(run) for name, run in runs.items()}
    gap = max(difference(out, outputs["inductor"]) for out in outputs.values())
    times = interleaved(
        {name: partial(call, run) for name, run in runs.items()}, job["seconds"], clock=clock(job["threads"])
    )
    return {"times": times, "difference": gap}


def step(model: nn.Module, run: Callable[..., Any], batch: dict[str, Tensor], train: bool) -> Tensor:
    """Return the model's last hidden state; with `train`, run a backward pass through its mean square first."""
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(train):
        out = run(**batch).last_hidden_state
        if train:
            out.square().mean().backward()
    return out.detach()


def model(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a whole model. The contender "sdpa" is Inductor on the library's own fused attention, same weights."""
    runs: dict[str, Callable[[], Tensor]] = {}
    torch.manual_seed(0)
    eager, batch = build(*job["model"])
    eager.train(job["train"])
    for name in job["contenders"]:
        own, backend = eager, name
        if name == "sdpa":
            own, backend = build(*job["model"], "sdpa")[0], "inductor"
            own.load_state_dict(eager.state_dict())
            own.train(job["train"])
        runs[name] = partial(step, own, compiled(own, backend), batch, job["train"])
    outputs = {name: run() for name, run in runs.items()}
    gap = max(difference(out, outputs["inductor"]) for out in outputs.values())
    return {
        "times": interleaved(runs, job["seconds"], least=3, clock=clock(job["threads"])),
        "difference": None if job["train"] else gap,  # the models' own dropout is on in training
        **rewritten(),
    }


def filled(model: nn.Module, kind: str, length: int, tokens: int) -> Callable[[], Any]:
    """Return a function that makes a dynamic or static cache of `length` tokens, with space for `tokens` more."""
    import transformers

    config: Any = model.config
    shape = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    states = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]

    def make() -> Any:
        cache: Any = transformers.DynamicCache(config=config)
        if kind == "static":
            cache = transformers.StaticCache(config=config, max_cache_len=length + tokens)
        for layer, (key, value) in enumerate(states):
            cache.update(key, value, layer)
        return cache

    return make


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Measure `generate()` of transformers from a cache of `length` tokens. Each contender compiles the model's
    `forward`; `same_tokens` compares with the model as it is. "sdpa" as in `model`."""
    name, layers, length, tokens = job["model"]
    torch.manual_seed(0)
    eager = generator(name, layers, length)
    make = filled(eager, job["cache"], length, tokens)
    prompt = torch.randint(1, 8192, (1, length + 1))

    def run(own: Any) -> Tensor:
        out = own.generate(prompt, past_key_values=make(), max_new_tokens=tokens, do_sample=False)
        return out[0, length + 1 :]

    expected, runs = run(eager), {}
    for contender in job["contenders"]:
        own: Any = generator(name, layers, length, "sdpa" if contender == "sdpa" else "eager")
        own.load_state_dict(eager.state_dict())
        own.forward = torch.compile(own.forward, backend="inductor" if contender == "sdpa" else contender)
        runs[contender] = partial(run, own)
    same = {contender: run().equal(expected) for contender, run in runs.items()}
    times = interleaved(runs, job["seconds"], least=3, clock=clock(job["threads"]))
    return {"times": times, "same_tokens": same, **rewritten()}


def rewritten() -> dict[str, int]:
    """Count the attention sites of the graphs compiled so far, and those that were rewritten."""
    import attnfx

    sites = [site for report in attnfx.reports() for site in report.sites]
    return {"sites": len(sites), "rewritten": sum(site.rewritten for site in sites)}


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the peak of a step after the first, minus the memory in use before it. "sdpa" as in `model`."""
    torch.manual_seed(0)
    backend, implementation = ("inductor", "sdpa") if job["backend"] == "sdpa" else (job["backend"], "eager")
    eager, batch = build(*job["model"], implementation)
    eager.train(job["train"])
    run = compiled(eager, backend)
    step(eager, run, batch, job["train"])
    eager.zero_grad(set_to_none=True)
    give_back_freed_memory()
    start = time.perf_counter()
    peak, _ = peak_over_base(lambda: step(eager, run, batch, job["train"]))
    result = {"peak_bytes": peak, "seconds": round(time.perf_counter() - start, 2)}
    return result | (rewritten() if backend == "attnfx" else {})


def compile_time(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a cold first call as a whole, and attnfx's part of it, from trace to rewrite. `inner` compiles the rest.

    "share" compares wall time, "cpu_share" CPU time. On a busy machine, trust the second. It is an upper bound, because
    the whole excludes the CPU time of Inductor's pool of C++ compilers.
    """
    from attnfx.compiler import pipeline

    torch.manual_seed(0)
    eager, batch = build(*job["model"])
    spent = {"wall": 0.0, "cpu": 0.0}
    original = pipeline.run

    def timed(*args: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return original(*args)
        finally:
            spent["wall"] += time.perf_counter() - wall
            spent["cpu"] += time.thread_time() - cpu

    pipeline.run = timed
    run = torch.compile(eager, backend="attnfx", options={"inner": job["inner"]}, dynamic=False)
    start, busy = time.perf_counter(), sum(os.times()[:4])
    step(eager, run, batch, job["train"])
    whole, whole_cpu = time.perf_counter() - start, sum(os.times()[:4]) - busy
    return {
        "whole_s": round(whole, 3),
        "attnfx_s": round(spent["wall"], 3),
        "attnfx_cpu_s": round(spent["cpu"], 3),
        "whole_cpu_s": round(whole_cpu, 3),
        "share": round(spent["wall"] / whole, 4),
        "cpu_share": round(spent["cpu"] / whole_cpu, 4),
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    logging.disable(logging.WARNING)
    torch.set_num_threads(job["threads"])
    kinds = {"attention": attention, "model": model, "memory": memory, "compile": compile_time, "generate": generate}
    print(json.dumps(kinds[job["kind"]](job)))


if __name__ == "__main__":
    main()
