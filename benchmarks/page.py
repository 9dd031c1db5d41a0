"""Write docs/performance.md and the README's table of numbers from benchmarks/results/*.json.

    python benchmarks/page.py                            (make performance also draws the pictures)

Every number in the text is computed here from a result file. The choices of the CPU cost model are made anew, from the
times in the grid's files and the rates in attnfx/cost/cpu.py. tests/benchmarks/test_page.py fails if the page or the
README's table differs from the text that this module returns.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import grid_fit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"

LABELS = {"eager": "eager", "inductor": "Inductor", "sdpa": "Inductor on `sdpa`", "attnfx": "attnfx"}
MODELS = {
    "llama": "Llama shape", "mistral": "Mistral shape", "bert": "BERT", "gpt2": "GPT-2", "t5": "T5", "swin": "Swin",
    "vit": "ViT", "grouped": "Llama with grouped heads",
}  # fmt: skip
COUNTS = "zero one two three four five six seven eight nine ten eleven twelve".split()
MIB = 2**20


# -- text ---------------------------------------------------------------------------------------
def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(words: str) -> str:
    """Wrap a paragraph; its line breaks and indentation do not count."""
    return textwrap.fill(" ".join(words.split()), 120, break_long_words=False, break_on_hyphens=False)


def ms(x: float) -> str:
    return f"{x:.0f} ms" if x >= 10 else f"{x:.2f} ms"


def mib(x: float) -> str:
    return f"{x / MIB:.0f} MiB" if x >= 100 * MIB else f"{x / MIB:.1f} MiB"


def percent(x: float, digits: int = 1) -> str:
    return f"{x:.{digits}%}"


def signed(x: float) -> str:
    """A relative error, without a sign if it rounds to zero."""
    shown = f"{x:+.1%}"
    return shown[1:] if float(shown[:-1]) == 0 else shown


def spread(values: Sequence[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def count(n: int, noun: str) -> str:
    return f"{COUNTS[n] if n < len(COUNTS) else n} {noun}{'' if n == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def direction(train: bool) -> str:
    return "training step" if train else "forward"


# -- contenders ---------------------------------------------------------------------------------
def amounts(row: dict[str, Any]) -> dict[str, float]:
    """The shortest time in ms, or the peak in bytes, of each contender of a row of run.py."""
    if "times" in row:
        return {name: t["min_ms"] for name, t in row["times"].items()}
    return {name: part["peak_bytes"] for name, part in row["by_backend"].items()}


def contenders(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in LABELS if any(name in amounts(row) for row in rows)]


def compared(row: dict[str, Any], names: Sequence[str], shown: Callable[[float], str]) -> list[str]:
    """A cell for each contender: its amount and, except for attnfx, attnfx's amount divided by it."""
    found = amounts(row)
    cells = []
    for name in names:
        part = "" if name == "attnfx" or name not in found else f" ({found['attnfx'] / found[name]:.2f})"
        cells.append(shown(found[name]) + part if name in found else "")
    return cells


def attention_of(job: dict[str, Any]) -> str:
    program, _, width = job["program"].partition(":")
    mask = f"window of {width}" if width else program
    return f"{mask}, {job['H']} heads x {job['T']} x {job['D']}"


def model_of(job: dict[str, Any]) -> str:
    name, layers, size, batch = job["model"]
    return f"{MODELS[name]}, {layers} layers, {batch} x {size} {unit_of(name, size)}"


def unit_of(name: str, size: int) -> str:
    """The unit of a model's size, as `benchmarks/models.py` takes it."""
    if name in ("swin", "vit"):
        return "patches" if size == 2448 else "pixels a side"
    return "tokens"


# -- sections -----------------------------------------------------------------------------------
def machines(*names: str) -> str:
    """Name the machine, versions and dates of some result files, or of all; a file that differs from most is named."""
    about = {name: stored(name).get("machine") for name in names or sorted(f.stem for f in RESULTS.glob("*.json"))}
    known = {name: found for name, found in about.items() if found}

    def most_and_others(say: Callable[[dict[str, Any]], str]) -> str:
        groups: dict[str, list[str]] = {}
        for name, found in known.items():
            groups.setdefault(say(found), []).append("peak memory" if name == "memory" else f"`{name}.json`")
        first, *rest = sorted(groups, key=lambda words: -len(groups[words]))
        return "; ".join([first, *(f"for {listed(groups[words])}, {words}" for words in rest)])

    def versions(found: dict[str, Any]) -> str:
        v = found["versions"]
        return f"Python {v['python']}, PyTorch {v['torch']}, Triton {v['triton']}, transformers {v['transformers']}"

    hardware = most_and_others(lambda m: f"{m['cores']} cores of an {m['cpu']}, {m['memory_GiB']} GiB, {m['system']}")
    days = sorted({found["date"] for found in known.values()})
    when = f"on {days[0]}" if len(days) == 1 else f"between {days[0]} and {days[-1]}"
    return f"Machine: {hardware}. {most_and_others(versions)}. Measured {when}."


def introduction() -> str:
    gpu = "" if (RESULTS / "gpu.json").exists() else "No time on this page was measured on a GPU."
    return text(f"""{machines()} {gpu} Models have random weights, and everything is float32 unless stated.""")


def method() -> str:
    return text("""The contenders of a row run in turn in one process, round after round, so that a slow phase of the
        machine affects all of them. The shortest time of each counts. With one thread the clock is the thread's own
        CPU time. A number in parentheses is attnfx's time or memory divided by that contender's: below 1, attnfx
        takes less. `sdpa` is PyTorch's fused attention, called by the function or by the model's own `sdpa`
        implementation.""")


def attention() -> str:
    files = [stored("attention"), stored("attention-one-thread")]
    names = contenders([row for file in files for row in file["rows"]])
    rows = [
        [attention_of(row["job"]), "forward and backward" if row["job"]["train"] else "forward", str(file["threads"]),
         *compared(row, names, ms)]
        for file in files for row in file["rows"]
    ]  # fmt: skip
    return "\n\n".join([
        "## Attention alone",
        text("""One function with hand-written attention, batch 1, its mask applied with `masked_fill` (causal) or
            `where` (window)."""),
        table(["attention", "pass", "threads", *(LABELS[name] for name in names)], rows),
    ])  # fmt: skip


def model_table(rows: Sequence[dict[str, Any]], shown: Callable[[float], str]) -> str:
    """Build the table of whole models: their rewritten sites, and the amount of each contender."""
    names = contenders(rows)

    def sites(row: dict[str, Any]) -> str:
        ours = row["by_backend"]["attnfx"] if "by_backend" in row else row
        return f"{ours['rewritten']} of {ours['sites']}"

    cells = [[model_of(r["job"]), direction(r["job"]["train"]), sites(r), *compared(r, names, shown)] for r in rows]
    return table(["model", "pass", "sites", *(LABELS[name] for name in names)], cells)


def models() -> str:
    file = stored("models")
    return "\n\n".join([
        "## Whole models, long sequences",
        text(f"""Models of the transformers library with its hand-written attention (`attn_implementation="eager"`),
            {count(file['threads'], 'thread')}. The Mistral shape has a sliding window. The sizes are in
            `benchmarks/models.py`. "Sites" counts the attention sites that were rewritten."""),
        model_table(file["rows"], ms),
    ])  # fmt: skip


def generation() -> str:
    file = stored("generate-one-thread")
    names = contenders(file["rows"])
    rows = []
    for row in file["rows"]:
        name, layers, _, tokens = row["job"]["model"]

        def speed(ms: float, tokens: int = tokens) -> str:
            return f"{tokens / ms * 1e3:.0f}"

        kept = f"{row['rewritten']} of {row['sites']}"
        rows.append([f"{name} shape, {layers} layers", row["job"]["cache"], kept, *compared(row, names, speed)])
    _, _, length, tokens = file["rows"][0]["job"]["model"]
    same = sum(all(row["same_tokens"].values()) for row in file["rows"])
    return "\n\n".join([
        "## Generation",
        text(f"""Tokens a second of `generate()` of transformers: {tokens} tokens after {length} in the cache, batch 1,
            {count(file['threads'], 'thread')}, hidden size 512, 8 heads with 2 pairs of keys and values. The Mistral
            shape has a window of {length} tokens. In {same} of {len(file['rows'])} rows all contenders return eager's
            tokens. Numbers in parentheses compare the times of a token. Other programs ran at the same time: the load
            was {file['machine']['load_at_start']:.1f}."""),
        table(["model", "cache", "sites", *(LABELS[name] for name in names)], rows),
    ])  # fmt: skip


def usual() -> str:
    file = stored("usual-one-thread")
    parts = [amounts(r)["attnfx"] / amounts(r)["inductor"] for r in file["rows"]]
    kept = sum(r["rewritten"] == 0 for r in file["rows"])
    return "\n\n".join([
        "## Whole models, short sequences",
        text(f"""Models of base width at their usual input sizes, {count(file['threads'], 'thread')}. Little is to be
            gained here, and the default must not lose: attnfx took {spread(parts)} times Inductor's time. In {kept}
            of {len(file['rows'])} rows the cost rule kept every site."""),
        model_table(file["rows"], ms),
    ])  # fmt: skip


def memory() -> str:
    file = stored("memory")
    return "\n\n".join([
        "## Peak memory",
        text(f"""The largest resident memory of the process during a step, minus its memory before the step
            (parameters and inputs). A process for each contender, {count(file['threads'], 'thread')}, after a first
            step that compiled. Inductor recognizes a ViT's plain attention by itself, and the cost rule leaves such
            sites to it."""),
        model_table(file["rows"], mib),
    ])  # fmt: skip


def compile_time() -> str:
    file = stored("compile")
    whole = [r for r in file["rows"] if r["job"]["inner"] == "inductor"]
    traced = [r for r in file["rows"] if r["job"]["inner"] != "inductor"]
    growth = ", ".join(f"{r['job']['model'][1]} layers {r['attnfx_s']:.1f} s" for r in traced)
    rows = [[model_of(r["job"]), f"{r['attnfx_s']:.2f} s", f"{r['whole_s']:.1f} s", percent(r["share"])] for r in whole]
    return "\n\n".join([
        "## Compile time",
        text("""The first call of a model with empty caches: attnfx's part, from tracing to the rewritten graph, and
            the whole call, both on the clock."""),
        table(["model, forward", "attnfx", "whole first call", "share"], rows),
        f"By depth, {MODELS[traced[0]['job']['model'][0]]} without Inductor, attnfx's part: {growth}.",
    ])  # fmt: skip


def worst_points(points: Sequence[dict[str, Any]], number: int = 3) -> str:
    """Name the points whose chosen way is the farthest from the fastest."""

    def over_best(point: dict[str, Any]) -> float:
        times = {name: t["min_ms"] for name, t in point["times"].items()}
        return times[grid_fit.chosen(point)] / min(times.values())

    named = [
        f"`{p['program']}` ({p['T']} queries, {p['S']} keys, batch {p['B']}, {direction(p['train'])}: "
        f"{over_best(p):.2f}, {'kept' if grid_fit.chosen(p) == 'kept' else 'rewritten'})"
        for p in sorted(points, key=over_best)[: -number - 1 : -1]
    ]
    return f"The {count(number, 'worst point')} are {listed(named)}, functions of `benchmarks/programs.py`."


# kind of attention -> programs of the grid
KINDS = {
    "no mask": ("plain", "plain_upcast"),
    "causal, window": ("causal", "window", "grouped"),
    "padding, mask tensors": ("padding", "padding_upcast", "masked"),
    "position biases": ("alibi", "relative"),
    "soft cap": ("softcap",),
    "dropout on the weights": ("dropout",),
    "`F.scaled_dot_product_attention` with a mask": ("fused_masked",),
}
QUERIES = {"1 query": (1, 1), "up to 128": (2, 128), "256 and 512": (129, 512), "1024 and more": (513, 1 << 30)}


def over_kept(point: dict[str, Any]) -> float:
    """The time of the fastest rewrite over the original's."""
    times = {name: t["min_ms"] for name, t in point["times"].items()}
    return min(t for name, t in times.items() if name != "kept") / times["kept"]


def choices() -> str:
    fitted, others, decode = (stored(name)["points"] for name in ("grid", "grid_held_out", "grid_decode"))
    halves = grid_fit.out_of_sample(fitted)
    rows = [
        ["the points that the rates are fitted to", grid_fit.regret(fitted)],
        ["points of other shapes, to which nothing is fitted", grid_fit.regret(others)],
        *(["half of the points, rates fitted to the other half", half] for half in halves),
        ["decode steps, to which the rates of few queries are fitted", grid_fit.regret(decode)],
        *(
            ["half of the decode steps, rates fitted to the other half", half]
            for half in grid_fit.out_of_sample(decode, grid_fit.use_decoding)
        ),
    ]
    shown = [
        [what, str(r["points"]), *(f"{r[key]:.2f}" for key in ("mean", "p95", "worst", "over_original"))]
        for what, r in rows
    ]
    queries = [p["T"] for p in fitted]
    dtypes = listed(sorted({p["dtype"] for p in fitted}))
    return "\n\n".join([
        "## Choices on a CPU",
        text(f"""The default (`rewrite="cost"`) predicts the time of each way to compute a site and takes the fastest.
            The grid has {len(fitted)} points: {len({p['program'] for p in fitted})} functions, {dtypes}, forward and
            training, {min(queries)} to {max(queries)} queries. At each point every way was timed in turn in one
            process, on {count(stored('grid')['threads'], 'thread')}. The table divides the time of the chosen way by
            that of the fastest way, and by the original's."""),
        table(["", "points", "chosen / fastest: mean", "95th percentile", "worst", "chosen / original: worst"], shown),
        text(f"""The set of rates, and the gain that a rewrite must promise, were settled with the points of other
            shapes known. {worst_points((*fitted, *others))}"""),
    ])  # fmt: skip


def losses() -> str:
    points = stored("grid")["points"]
    rows = []
    for what, programs in KINDS.items():
        for train in (False, True):
            some = [p for p in points if p["program"] in programs and p["train"] == train]
            columns = [[over_kept(p) for p in some if low <= p["T"] <= high] for low, high in QUERIES.values()]
            if some:
                rows.append([what, direction(train), *(spread(c) if c else "" for c in columns)])
    slower = [p for p in points if over_kept(p) > 1]
    rewritten = sum(grid_fit.chosen(p) != "kept" for p in slower)
    worst = grid_fit.regret(points)["over_original"]
    return "\n\n".join([
        "### Where a rewrite does not pay",
        text(f"""The fastest rewrite's time divided by the original's under Inductor, over the points of the same
            grid; above 1, rewriting loses. It loses for few queries, for short sequences in small batches, and for
            attention without a mask, which Inductor fuses by itself. A rewrite loses at {len(slower)} of
            {len(points)} points. The default still rewrites {rewritten} of these, at {worst:.2f} times the original's
            time at worst; `rewrite="always"` rewrites all of them."""),
        table(["attention", "pass", *QUERIES], rows),
    ])  # fmt: skip


def choice_time() -> str:
    found = stored("choice")["rows"]
    rows = []
    for target in dict.fromkeys(r["target"] for r in found):
        some = [r for r in found if r["target"] == target]
        first, again, mask = ([r[key] for r in some] for key in ("first", "again", "mask"))
        rows.append([
            f"`{target}`", f"{statistics.median(first):.2f} ms", f"{max(first):.2f} ms",
            f"{max(r['first_worst'] for r in some):.2f} ms", f"{statistics.median(again):.2f} ms",
            f"{statistics.median(mask):.2f} ms", f"{max(mask):.2f} ms",
        ])  # fmt: skip
    first = [r["first"] for r in found]
    lengths = listed([str(n) for n in sorted({r["length"] for r in found})])
    return "\n\n".join([
        "### Time of a choice",
        text(f"""CPU time of one thread for one site's decision: {len(found)} questions, of
            {count(len({r['target'] for r in found}), 'device')}, {count(len({r['of'] for r in found}), 'mask')},
            {lengths} tokens, forward and training. "First" is the first decision for a program and its sizes, the
            median over several programs; "again" is any later one. The analysis of the mask comes before it, once for
            a program and its sizes. Over all questions the median of a first decision is
            {statistics.median(first):.2f} ms."""),
        table(["device", "first: median", "largest", "slowest run", "again", "mask: median", "largest"], rows),
    ])  # fmt: skip


def whole_rows() -> str:
    file = stored("rows")
    names = {"best_keys": "top-k", "best_causal_keys": "causal top-k", "talking_heads": "talking heads"}
    rows = []
    for key, name in names.items():
        found = file["programs"][key]
        for contender in ("eager", "inductor", "attnfx"):
            if contender in found:
                part, ours = found[contender], found["attnfx"]
                times, sizes = (part["seconds"], part["forward_seconds"]), (part["peak_MiB"], part["live_MiB"])
                our_times, our_sizes = (ours["seconds"], ours["forward_seconds"]), (ours["peak_MiB"], ours["live_MiB"])
                earlier = " (earlier run)" if contender in found.get("earlier", ()) else ""
                rows.append([
                    name, LABELS[contender] + earlier,
                    *(f"{a:.1f} s" + ("" if part is ours else f" ({b / a:.2f})") for a, b in zip(times, our_times)),
                    *(f"{a:.0f} MiB" + ("" if part is ours else f" ({b / a:.2f})") for a, b in zip(sizes, our_sizes)),
                ])  # fmt: skip
    _, heads, length, width = file["shape"]
    kept = [
        [
            str(a["keys"]),
            f"{a['saved_bytes'] / MIB:.1f} MiB",
            *(f"{x:.1f} MiB" for x in a["chunk_MiB_by_rows"].values()),
        ]
        for a in file["activations"]
    ]
    sizes = list(file["activations"][0]["chunk_MiB_by_rows"])
    return "\n\n".join([
        "## Whole rows",
        text(f"""Attention that needs whole rows of scores: {heads} heads x {length} x {width},
            {count(file['threads'], 'thread')}, a process for each contender. "Peak" is the process's, "tensors"
            counts PyTorch's allocations; both count from the memory in use before the step."""),
        table(["attention", "contender", "training step", "forward", "peak", "tensors"], rows),
        text(f"""Memory by chunk size: top-k over {file['activations'][0]['rows']} queries. "Saved": bytes that a
            training step keeps for its backward pass, without operands and result. The other columns: the peak of a
            forward pass without operands and result, by the number of rows in a chunk."""),
        table(["keys", "saved", *(f"{n} rows" for n in sizes)], kept),
    ])  # fmt: skip


def case(name: str) -> dict[str, Any]:
    """The parts of a key of plan.json."""
    model, layers, size, batch, kind, *options = name.split(", ")
    return {
        "model": model, "layers": int(layers.split()[0]), "size": int(size.split()[0]), "batch": int(batch.split()[1]),
        "train": kind == "training", "uncompiled": bool(options),
    }  # fmt: skip


def plans() -> str:
    file = stored("plan")
    steps = [case(name) | row for name, row in file["steps"].items()]
    error = file["error of steps"]
    batches = sorted({s["batch"] for s in steps})
    rows = []
    for model in dict.fromkeys(s["model"] for s in steps):
        for train in (False, True):
            some = {s["batch"]: s for s in steps if s["model"] == model and s["train"] == train}
            size = next(iter(some.values()))["size"]
            cells = [f"{mib(some[b]['measured'])}, {signed(some[b]['error'])}" if b in some else "" for b in batches]
            rows.append([f"{MODELS[model]}, {size} tokens", direction(train), *cells])
    return "\n\n".join([
        "## Plans: predicted and measured peaks",
        text(f"""`attnfx.plan` predicts the peak of a compiled step; the allocator's events show it. Both count from
            the memory allocated before the step. Models of {steps[0]['layers']} layers, each in a process of its own,
            on one thread. A cell has the measured peak and the error of the prediction. Over {error['rows']} steps
            the error is {percent(error['mean'])} on average and {percent(error['worst'])} at worst; the prediction
            was developed on these steps. Peaks on a GPU have not been measured."""),
        table(["model", "pass", *(f"batch {b}" for b in batches)], rows),
        *chunks(file),
    ])  # fmt: skip


def chunks(file: dict[str, Any]) -> list[str]:
    """Attention written as a loop over chunks: uncompiled at full depth, and with attnfx."""
    full = {case(name)["model"]: row for name, row in file["chunks of twelve layers"].items()}
    depth = case(next(iter(file["chunks of twelve layers"])))["layers"]
    found = [case(name) | row for name, row in file["chunks"].items()]
    error = file["error of chunks"]

    def cell(row: dict[str, Any]) -> str:
        return f"{row['measured'] / 1e9:.3f} GB, {signed(row['error'])}"

    rows = []
    for model, row in full.items():
        ours = [f for f in found if f["model"] == model and not f["uncompiled"]]
        size = found[0]["size"]
        written = f"all {size}" if model.endswith("whole") else model.rpartition("-")[2]
        rows.append([written, cell(row), *map(cell, sorted(ours, key=lambda f: f["layers"]))])
    layers = sorted({f["layers"] for f in found})
    off = {round((f["predicted"] - f["measured"]) / 1e6) for f in found if f["uncompiled"]}
    same = (
        f" Each uncompiled prediction is {off.pop()} MB too large: the output and its gradient."
        if len(off) == 1
        else ""
    )
    return [
        text(f"""The same with attention written as a loop over chunks of queries: layers of a ViT with
            {found[0]['size']} tokens, training, one image. Without a compiler each layer adds the same bytes, so
            {depth} layers are extrapolated from {listed([str(n) for n in layers])}. Over all {error['rows']} steps
            the error is {percent(error['mean'])} on average and {percent(error['worst'])} at worst.{same}"""),
        table(["queries in a chunk", f"uncompiled, {depth} layers",
               *(f"with attnfx, {count(n, 'layer')}" for n in layers)], rows),
    ]  # fmt: skip


def plan_limits() -> str:
    plans = stored("plan_targets")["plans"]
    rows = []
    for name, p in plans.items():
        model, layers, size, kind, target = name.split(", ")
        rows.append([
            f"{MODELS[model].removesuffix(' shape')}, {layers}, {size} tokens, {kind}", f"`{target}`",
            f"{p['peak_bytes'] / 2**30:.1f} GiB", f"{p['plan_cpu_s']:.0f} s", str(p["max_batch"]),
            f"{p['max_batch_cpu_s']:.0f} s", str(p["max_length"] or ""),
        ])  # fmt: skip
    agreed = sum(p["agrees"] for p in plans.values())
    return "\n\n".join([
        "### Plans for other devices",
        text(f"""Predictions, not measurements of these devices: peak at the planned batch, largest batch and length,
            with AdamW, and the CPU seconds that they took. Plans made anew at the largest batch and one above it
            confirm the limit (the first fits, the second does not) in {agreed} of {len(plans)} cases."""),
        table(["model", "target", "peak", "plan took", "max_batch", "took", "max_length"], rows),
    ])  # fmt: skip


def budgets() -> str:
    found = stored("budget")["models"]
    rows = []
    for name, steps in found.items():
        half = min(steps, key=lambda r: abs(r["share"] - 0.5))
        least = min(steps, key=lambda r: r["share"])
        worst = max((r["error"] for r in steps), key=abs)
        rows.append([
            name, mib(steps[0]["unplanned"]), f"{mib(least['budget'])} ({least['share']:.2f})", mib(least["measured"]),
            f"{sum(r['within'] for r in steps)} of {len(steps)}", f"{worst:+.2%}", f"{half['time_ratio']:.2f}",
            f"{least['time_ratio']:.2f}",
        ])  # fmt: skip
    steps = [r for some in found.values() for r in some]
    gradients = max(r["gradient_error"] for r in steps)
    equal = "bit for bit equal" if gradients == 0 else f"equal up to {gradients:.1e}"
    ordered = [sorted(some, key=lambda r: -r["share"]) for some in found.values()]
    falling = all(a["measured"] >= b["measured"] for some in ordered for a, b in pairwise(some))
    never = " No peak rose as the budget fell." if falling else ""
    return "\n\n".join([
        "## Memory budgets",
        text(f"""Training steps of two small models with dropout under budgets from the unplanned step's peak down to
            the smallest possible, one thread. Attention is rewritten everywhere, with and without a budget. Bytes
            count from those before the step; times are the median of pairs that run in turn, divided by the unplanned
            step's. The gradients are {equal} to the unplanned step's.{never}"""),
        table(["model", "unplanned peak", "smallest budget (share)", "peak under it", "within budget",
               "worst prediction error", "time at half", "time at the smallest"], rows),
    ])  # fmt: skip


def published() -> str:
    found = stored("published")["rows"]
    sources = list(dict.fromkeys(r["source"] for r in found))
    longest = max(r["length"] for r in found)
    bound, rest = [r for r in found if r["held"]], [r for r in found if not r["held"]]

    def errors(some: Sequence[dict[str, Any]]) -> tuple[str, str]:
        sizes = [abs(r["error"]) for r in some]
        return percent(statistics.mean(sizes)), percent(max(sizes))

    names = {"flash-attention-3": "FlashAttention-3", "flash-attention-2": "FlashAttention-2", "cudnn": "cuDNN",
             "triton": "Triton"}  # fmt: skip
    rows = []
    for r in found:
        if r["length"] == longest:
            same = [
                o for o in found
                if all(o[k] == r[k] for k in ("kernel", "device", "width", "causal", "backward", "source"))
            ]  # fmt: skip
            rows.append([
                f"{names[r['kernel']]} [{sources.index(r['source']) + 1}]", f"`{r['device']}`", str(r["width"]),
                ("backward" if r["backward"] else "forward") + (", causal" if r["causal"] else ""),
                f"{r['published']:.0f}", f"{r['predicted']:.0f}",
                signed(r["error"]), errors(same)[1],
            ])  # fmt: skip
    mean, worst = errors(bound)
    other_mean, other_worst = errors(rest)
    widths = listed([str(n) for n in sorted({r["width"] for r in bound})])
    near = 0.15
    within = sum(abs(r["error"]) <= near for r in bound)
    return "\n\n".join([
        "## Predictions for GPUs, compared with published speeds",
        text(f"""The GPU cost model predicts the speed of kernels that others measured, from their schedules and
            instruction counts. Over {len(bound)} published points ({min(r['length'] for r in bound)} tokens and more,
            head widths {widths}) the error is {mean} on average and {worst} at worst; {within} are within
            {percent(near, 0)}. Over the other {len(rest)} points (shorter rows, wider heads) it is {other_mean} and
            {other_worst}. A factor for each backward kernel is fitted to its points at {longest} tokens; what counts
            as a stream was settled with the table known. The kernels of attnfx are not among them."""),
        text(f"""TFLOP/s at {longest} tokens; the last column is the largest error over all lengths of the row."""),
        table(["kernel", "device", "head width", "pass", "published", "predicted", "error", "any length"], rows),
        "\n".join(f"{n}. {source}" for n, source in enumerate(sources, 1)),
    ])  # fmt: skip


def machine_code() -> str:
    file = stored("sass")
    kernels = {
        "forward": "forward", "backward": "gradients of key and value", "backward-rows": "gradient of query",
        "decode": "few queries",
    }  # fmt: skip
    found = {tuple(r["kernel"].rsplit("-", 2)): r for r in file["rows"]}
    capabilities, widths = (sorted({int(key[n]) for key in found}) for n in (1, 2))
    rows = []
    for capability in capabilities:
        for kernel, what in kernels.items():
            cells = []
            for width in widths:
                r = found[kernel, str(capability), str(width)]
                rate, goal = r["loop"]["instrs_per_kflop"], r["goal"]
                cells.append("" if rate is None else f"{rate:.3f}" + (f" ({goal:.3f})" if goal else ""))
            if any(cells):
                rows.append([f"{capability / 10:.1f}", what, *cells])
    spilling = sum(r["loop"]["spills"] > 0 for r in file["rows"])
    return "\n\n".join([
        "## Machine code of the Triton kernels",
        text(f"""Instructions of a warp per 1000 FLOPs of its matrix instructions, in the loop over tiles without a
            mask: fewer are better. Plain attention in bfloat16, compiled ahead of time with Triton {file['triton']};
            nothing is timed, and no GPU is needed. In parentheses: the best open Triton kernel for the same program.
            Kernels whose machine code does not show the FLOPs are left out. Registers spill in {spilling} of
            {len(file['rows'])} loops."""),
        table(["compute capability", "kernel", *(f"head width {w}" for w in widths)], rows),
    ])  # fmt: skip


def files() -> str:
    rows = [
        ["`attention.json`, `models.json`, `memory.json`, `compile.json`", "`make bench`"],
        [
            "`attention-one-thread.json`, `usual-one-thread.json`, `generate-one-thread.json`",
            "`python benchmarks/run.py attention usual generate --threads 1`",
        ],
        [
            "`grid.json`; `grid_held_out.json`, `grid_flex.json`, `grid_decode.json`",
            "`python benchmarks/grid.py`; with `--grid held_out`, `flex`, `decode`",
        ],
        ["`choice.json`", "`python benchmarks/choice.py`"],
        ["`rows.json`", "`python benchmarks/rows.py`"],
        ["`plan.json`, `plan_targets.json`", "`python benchmarks/plan.py`, `plan_targets.py`"],
        ["`budget.json`", "`python benchmarks/budget.py`"],
        ["`published.json`", "`python benchmarks/published.py`"],
        ["`sass.json`", "`python benchmarks/machine_code.py counts`"],
    ]
    return "\n\n".join(["## How to measure again", table(["file in `benchmarks/results/`", "written by"], rows)])


SECTIONS = (
    introduction, method, attention, models, generation, usual, memory, compile_time, choices, losses, choice_time,
    whole_rows, plans, plan_limits, budgets, published, machine_code, files,
)  # fmt: skip


def page() -> str:
    """Return the text of docs/performance.md."""
    head = text("""This page is generated: `make performance` writes it from the files in `benchmarks/results/`. Each
        number is computed from such a file.""")
    return "\n\n".join(["# Performance", head, *(section() for section in SECTIONS)]) + "\n"


# -- the README's table -------------------------------------------------------------------------
def training_peaks() -> list[dict[str, Any]]:
    """Return the training steps of memory.json, the causal models first."""
    return sorted(
        (r for r in stored("memory")["rows"] if r["job"]["train"]), key=lambda r: r["job"]["model"][0] == "vit"
    )


def headline() -> str:
    """Return the README's table and its sentence, without the markers."""
    alone, whole, peaks = stored("attention"), stored("models"), stored("memory")
    threads = {file["threads"] for file in (alone, whole, peaks)}
    picked = [
        *((f"attention alone, {attention_of(r['job'])}, forward{' and backward' * r['job']['train']}", r, ms)
          for r in alone["rows"] if r["job"]["program"] == "causal" or not r["job"]["train"]),
        *((f"{model_of(r['job'])}, {direction(r['job']['train'])}", r, ms) for r in whole["rows"]),
        *((f"peak memory: {model_of(r['job'])}, training step", r, mib)
          for r in training_peaks() if r["job"]["model"][0] == "llama"),
    ]  # fmt: skip
    others = ("inductor", "sdpa")
    rows = []
    for what, row, shown in picked:
        found = amounts(row)
        parts = [f"{found['attnfx'] / found[name]:.2f}" for name in others if name in found]
        cells = [shown(found[name]) if name in found else "" for name in ("attnfx", *others)]
        rows.append([what, *cells, " / ".join(parts)])
    about = text(f"""Float32, {listed([str(n) for n in sorted(threads)])} threads. "Ratio" is attnfx divided by Inductor
        on the hand-written attention, and by Inductor on the model's fused attention (`sdpa`).
        {machines("attention", "models", "memory")}""")
    return "\n\n".join([table(["", "attnfx", "Inductor", "Inductor on `sdpa`", "ratio"], rows), about])


def with_headline(readme: str) -> str:
    """Return the README's text with its table made anew. Raises ValueError if a marker is missing."""
    before, after = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return readme[:before] + "\n\n" + headline() + "\n\n" + readme[after:]


def main() -> None:
    PAGE.write_text(page())
    README.write_text(with_headline(README.read_text()))


if __name__ == "__main__":
    main()
