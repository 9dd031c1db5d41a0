"""Measure the time of one site's decision, in this thread's own CPU time.

    python benchmarks/choice.py [--out benchmarks/results/choice.json]

`first` is the first decision for a spec and its sizes: the median over specs that differ in their constants. `again`
is a later decision, as for the other layers of a model. `mask` is the analysis of the mask that precedes a rewrite,
once per spec and sizes, without its description for the report. Work done once per process, such as reading the tables,
is not counted either. Nothing is compiled. Each device and mask has its own process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from attnfx.cost import Question, select
from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.kernels.operators.attention import refusals
from attnfx.mask import describe, prepare
from attnfx.options import Options
from attnfx.spec import AttentionSpec, H, I, J
from attnfx.targets import Target

OUT = Path(__file__).parent / "results" / "choice.json"
SPECS = 7
LENGTHS = (2048, 16384, 131072)
DEVICES = ("h100-sxm", "a100-80gb", "rtx4090", "cpu")
CAUSAL = A.ge(I, J)


def within(reach: int) -> Expr:
    return A.lt(A.sub(I, J), A.const(reach))


def image(width: int) -> Expr:
    rows, columns = (A.sub(f(I, A.const(width)), f(J, A.const(width))) for f in (A.floordiv, A.mod))
    return A.and_(*(A.le(A.unary("abs", gap), A.const(4)) for gap in (rows, columns)))


# n makes the specs distinct; the last three masks are not unions of key intervals
MASKS = {
    "plain": lambda n: None,
    "causal": lambda n: CAUSAL,
    "window": lambda n: A.and_(CAUSAL, within(1000 + n)),
    "sinks": lambda n: A.and_(CAUSAL, A.or_(within(1000 + n), A.lt(J, A.const(4)))),
    "prefix": lambda n: A.or_(CAUSAL, A.lt(J, A.const(100 + n))),
    "blocks": lambda n: A.eq(A.floordiv(I, A.const(64 + n)), A.floordiv(J, A.const(64 + n))),
    "dilated": lambda n: A.and_(CAUSAL, A.eq(A.mod(A.sub(I, J), A.const(3 + n)), A.ZERO)),
    "by head": lambda n: A.and_(CAUSAL, A.or_(within(1000 + n), A.lt(H, A.const(4)))),
    "image": lambda n: image(48 + n),
}


def question(mask: str, n: int, device: str, length: int, training: bool) -> Question:
    keep, score = MASKS[mask](n), A.mul(A.const(0.125 + n / 1024), A.DOT)
    if keep is not None:
        score = A.where(keep, score, A.const(float("-inf")))
    dims = dict(B=1, H=32, G=8, T=length, S=length, D=128, Dv=128)
    dtype, kind = ("float32", "cpu") if device == "cpu" else ("bfloat16", "cuda")
    spec = AttentionSpec(score=score, out_dtype=dtype)
    capability = None if device == "cpu" else Target.by_name(device).capability
    refused = refusals(spec, getattr(torch, dtype), torch.device(kind), dims["D"], dims["Dv"], capability)
    return Question(spec, dims, dtype, kind, training=training, refused=refused)


def milliseconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return (time.thread_time() - start) * 1e3


def measure(device: str, mask: str) -> list[dict[str, object]]:
    target = None if device == "cpu" else Target.by_name(device)
    rows, number = [], 0
    for training in (False, True):  # reads the tables
        select(question(mask, 99, device, 512, training), Options(), device=target)
    for length in LENGTHS:
        for training in (False, True):
            masks, first, again = [], [], []
            for _ in range(SPECS):
                number += 1
                ask = question(mask, number, device, length + 128 * number, training)
                describe(ask.spec, ask.dims)
                masks.append(milliseconds(lambda ask=ask: prepare(ask.spec, ask.dims)))
                choose = partial(select, ask, Options(), device=target)
                first.append(milliseconds(choose))
                again += [milliseconds(choose) for _ in range(5)]
            found = {
                "mask": statistics.median(masks),
                "first": statistics.median(first),
                "first_worst": max(first),
                "again": min(again),
            }
            rows.append(dict(target=device, of=mask, length=length, training=training)
                        | {name: round(ms, 3) for name, ms in found.items()})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = []
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for found in pool.starmap(measure, [(d, m) for d in DEVICES for m in MASKS], chunksize=1):
            rows += found
    for row in rows:
        print("{target:10} {of:8} {length:6} {way:8} mask {mask:6.3f}, first {first:6.3f} (worst {first_worst:6.3f}), "
              "again {again:6.3f} ms".format(way="training" if row["training"] else "forward", **row))  # fmt: skip
    options.out.write_text(json.dumps({"unit": "ms of one thread's own time", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
