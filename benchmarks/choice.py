"""How long a choice takes: one site's decision for a GPU, of this thread's own CPU time.

    python benchmarks/choice.py [--out benchmarks/results/choice.json]

`first` is the first decision for a spec and its sizes, in which the mask's tiles are counted; `again` any later one, as
for the other layers of a model. Nothing is compiled in either.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from attnfx.cost import Question, decide
from attnfx.ir import algebra as A
from attnfx.options import Options
from attnfx.spec import AttentionSpec, I, J
from attnfx.targets import Target

OUT = Path(__file__).parent / "results" / "choice.json"
SCORE = A.mul(A.const(0.125), A.DOT)
CAUSAL = A.ge(I, J)
MASKS = {"plain": None, "causal": CAUSAL, "window": A.and_(CAUSAL, A.lt(A.sub(I, J), A.const(1024)))}


def milliseconds(ask: Question, target: Target) -> float:
    start = time.thread_time()
    decide(ask, Options(), device=target)
    return (time.thread_time() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = []
    for device in ("h100-sxm", "a100-80gb", "rtx4090"):
        target = Target.by_name(device)
        for name, keep in MASKS.items():
            score = SCORE if keep is None else A.where(keep, SCORE, A.const(float("-inf")))
            for length in (2048, 16384):
                for training in (False, True):
                    dims = dict(B=1, H=32, G=8, T=length, S=length, D=128, Dv=128)
                    spec, refused = AttentionSpec(score=score), {"library": "it runs on the CPU"}
                    ask = Question(spec, dims, "bfloat16", "cuda", training=training, refused=refused)
                    first = milliseconds(ask, target)
                    again = min(milliseconds(ask, target) for _ in range(50))
                    rows.append(dict(target=device, mask=name, length=length, training=training, first=round(first, 3),
                                     again=round(again, 3)))  # fmt: skip
                    print(f"{device:10} {name:7} {length:6} {'training' if training else 'forward':8} "
                          f"first {first:8.3f} ms, again {again:6.3f} ms", flush=True)  # fmt: skip
    options.out.write_text(json.dumps({"unit": "ms of one thread's own time", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
