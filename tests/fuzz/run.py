"""Generate random programs around attentions, compile them with attnfx, and compare them with eager.

    python tests/fuzz/run.py [--graphs 10000] [--seed 0] [--inner eager|aot_eager|mixed] [--workers 1] [--only NAME]
                             [--json OUT] [--recipe TEXT] [--limit 120]

Findings are printed; one of each kind is shrunk and printed with its smaller recipe. The exit code is 1 if there are
any. Batches run in their own process: a program that crashes it or hangs is a finding and does not affect the others.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BATCH = 100  # programs per process
MARK = "answer "  # marks lines for the parent, because libraries print to stdout as well


def prepare() -> None:
    """Make `tests` importable as pytest does, without the project's root on sys.path. There, the folder `kernels` would
    hide the package of that name."""
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != Path(__file__).resolve().parent]
    tests = types.ModuleType("tests")
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests
    if "ATTNFX_CACHE_DIR" not in os.environ:
        os.environ["ATTNFX_CACHE_DIR"] = tempfile.mkdtemp(prefix="attnfx-fuzz-")
        atexit.register(shutil.rmtree, os.environ["ATTNFX_CACHE_DIR"], ignore_errors=True)
    logging.disable(logging.ERROR)


# -- the child: a batch of programs -----------------------------------------------------------------
def serve(args: argparse.Namespace) -> None:
    from tests.fuzz.hold import Outcome, hold, shrunk
    from tests.fuzz.recipes import Recipe, recipe

    def tell(**answer: Any) -> None:
        print(MARK + json.dumps(answer), flush=True)

    def told(outcome: Outcome) -> dict[str, Any]:
        return {"recipe": str(outcome.recipe), "verdict": outcome.verdict, "told": outcome.told[:6],
                "kinds": sorted(outcome.kinds)}  # fmt: skip

    seen: set[tuple[str, ...]] = {tuple(k) for k in json.loads(args.seen)}
    for seed in range(args.seed, args.seed + args.graphs):
        made = Recipe.parse(args.recipe) if args.recipe else recipe(seed, args.inner, args.only)
        tell(begun=str(made))
        outcome = hold(made)
        answer = told(outcome) | {"rewritten": outcome.rewritten, "untraced": outcome.untraced}
        if outcome.finding and not args.recipe:
            key = (outcome.verdict, *sorted(outcome.kinds))
            if key not in seen or args.shrink:
                tell(**answer, shrinking=True)
                answer["shrunk"] = told(shrunk(outcome))
            seen.add(key)
        tell(**answer)


# -- the parent ----------------------------------------------------------------------------------------
def batch(args: argparse.Namespace, seed: int, count: int, seen: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """Yield a process's answers on `count` programs from `seed` on. A program that ended the process comes last."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", "--seed", str(seed), "--graphs", str(count)]
    command += ["--inner", args.inner, "--seen", json.dumps(sorted(seen)), *(["--shrink"] if args.shrink else [])]
    command += [*(["--only", args.only] if args.only else []), *(["--recipe", args.recipe] if args.recipe else [])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    for work in (read, lambda: errors.extend(child.stderr or ())):
        threading.Thread(target=work, daemon=True).start()
    last: dict[str, Any] = {}
    try:
        while True:
            try:
                line = lines.get(timeout=args.limit)
            except queue.Empty:
                yield {"recipe": last.get("recipe", ""), "verdict": "late", "told": [f"more than {args.limit:g} s"]}
                return
            if line is None:
                break
            if not line.startswith(MARK):
                continue
            answer = json.loads(line.removeprefix(MARK))
            if "begun" in answer:
                last = {"recipe": answer["begun"]}
            elif not answer.get("shrinking"):
                last = {}
                yield answer
        if child.wait():
            told = [*(x.strip() for x in errors[-3:]), f"exit status {child.returncode}"]
            yield {"recipe": last.get("recipe", ""), "verdict": "down", "told": told}
    finally:
        child.kill()
        child.wait()


def work(args: argparse.Namespace, seeds: queue.Queue[tuple[int, int]], results: queue.Queue[dict[str, Any] | None],
         seen: set[tuple[str, ...]]) -> None:  # fmt: skip
    while True:
        try:
            seed, count = seeds.get_nowait()
        except queue.Empty:
            results.put(None)
            return
        done = 0
        while done < count:
            before = done
            for answer in batch(args, seed + done, count - done, seen):
                done += 1
                results.put(answer)
                if not answer["recipe"]:  # the process failed before its first program, so all would
                    results.put(None)
                    return
            if done == before:
                results.put({"recipe": "", "verdict": "down", "told": ["a process ended without an answer"]})
                results.put(None)
                return


def tell(answer: dict[str, Any]) -> None:
    print(f"\n{answer['verdict']}: {answer['recipe']}")
    made = answer.get("shrunk", answer)
    if made is not answer:
        print(f"  shrunk: {made['recipe']}")
    for line in made["told"]:
        print(f"    {line}")
    sys.stdout.flush()


def search(args: argparse.Namespace) -> int:
    seeds: queue.Queue[tuple[int, int]] = queue.Queue()
    for start in range(0, args.graphs, BATCH):
        seeds.put((args.seed + start, min(BATCH, args.graphs - start)))
    results: queue.Queue[dict[str, Any] | None] = queue.Queue()
    seen: set[tuple[str, ...]] = set()
    for _ in range(args.workers):
        threading.Thread(target=work, args=(args, seeds, results, seen), daemon=True).start()
    verdicts: Counter[str] = Counter()
    rewritten, running, begun, findings, untraced = 0, args.workers, time.monotonic(), [], Counter[str]()
    examples: dict[str, str] = {}
    while running:
        answer = results.get()
        if answer is None:
            running -= 1
            continue
        verdicts[answer["verdict"]] += 1
        rewritten += bool(answer.get("rewritten"))
        for text in answer.get("untraced", ()):
            untraced[text] += 1
            examples.setdefault(text, answer["recipe"])
        if answer["verdict"] in ("fault", "differs", "late", "down"):
            findings.append(answer)
            seen.add((answer["verdict"], *answer.get("kinds", ())))
            tell(answer)
        elif answer["verdict"] == "PyTorch's own" and args.own:
            tell(answer)
        if (done := verdicts.total()) % BATCH == 0 or done == args.graphs:
            ran = done - verdicts["eager raises"] or 1
            per = (time.monotonic() - begun) / done
            print(f"{done} programs, {per:.2f} s each, {rewritten / ran:.0%} rewritten, {dict(verdicts)}", flush=True)
    for text, count in untraced.most_common():
        print(f"{count} x {text}\n    {examples[text]}")
    if args.json:
        summary = {"programs": verdicts.total(), "verdicts": dict(verdicts), "rewritten": rewritten}
        Path(args.json).write_text(json.dumps(summary | {"untraced": dict(untraced), "findings": findings}, indent=1))
    return 1 if findings else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner", choices=("eager", "aot_eager", "mixed"), default="eager")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a program may take, shrinking included")
    parser.add_argument("--only", help="a part that every program holds")
    parser.add_argument("--json", help="where to write the findings")
    parser.add_argument("--recipe", help="one recipe to run instead")
    parser.add_argument("--shrink", action="store_true", help="shrink every finding, not one of each kind")
    parser.add_argument("--own", action="store_true", help="show also what PyTorch's own compiler does otherwise")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seen", default="[]", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.recipe:
        args.graphs = 1
    if args.serve:
        prepare()
        serve(args)
        return 0
    return search(args)


if __name__ == "__main__":
    sys.exit(main())
