"""Implement `verify="first"`: compare each rewritten site with the original subgraph when a graph is compiled.

A graph is compiled when it is first called, and the backend receives the tensors of that call. The prepared graph runs
on them once in eager, up to its last site. As soon as the inputs of a site are computed, the original and the rewrite
run on them, forward and, in training, backward. The run leaves all state unchanged: the graph writes to copies of its
inputs, and the random generators are restored.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Interpreter, Node

from attnfx import cache
from attnfx.options import Options
from attnfx.passes.fx.analysis import Facts
from attnfx.passes.fx.nodes import number
from attnfx.passes.rewrite.subgraph import Pair, Trial, weight
from attnfx.targets.available import free_on
from attnfx.verify import repro
from attnfx.verify.compare import Difference

# Higher-order operators whose bodies run here: from the operands, the index of the body and the body's arguments.
BODIES = {
    "tag_activation_checkpoint": lambda _, *inputs: (0, inputs),
    "wrap": lambda _, *inputs: (0, inputs),
    "cond": lambda chosen, yes, no, inputs: (1 if bool(chosen) else 2, inputs),
}


class CannotVerify(Exception):
    """The failure to compare one or all sites of a graph; the message gives the reason."""


@dataclass
class Failure:
    """A site whose rewrite gave a different result. `script` reproduces it; None if it could not be written."""

    pair: Pair
    problem: str
    script: Path | None

    def __str__(self) -> str:
        return self.problem + (f"; to reproduce it, run {self.script}" if self.script else "")


def compare(trial: Trial, example_inputs: Sequence[Any], options: Options) -> tuple[dict[str, str], dict[str, Failure]]:
    """Compare each pair of a trial on the inputs of a call, and return notes and failures by the pairs' names.

    The notes are for the report. One warning names the sites with different results, another names the sites that could
    not be compared.
    """
    pairs = trial.all_pairs()
    if not pairs:
        return {}, {}
    done = _Outcome(options, torch.is_grad_enabled())
    devices = sorted({x.device.index or 0 for x in example_inputs if isinstance(x, Tensor) and x.is_cuda})
    why = "its part of the graph did not run"
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            _Run(trial, done).run(*_own(example_inputs, trial))
    except Exception as problem:  # any failure here only prevents the comparison
        why = _why(problem)
    for pair in pairs:
        done.notes.setdefault(pair.name, f"not verified: {why}")
    missed = {n: f"{p.site.where or p.site.name} {n}" for p in pairs if (n := done.notes[p.name]).startswith("not")}
    if missed:
        _warn("; ".join(missed.values()))
    if done.failures:
        told = "; ".join(f"{f.pair.site.where or f.pair.site.name}: {f}" for f in done.failures.values())
        _warn(f"a rewrite and its original disagreed, so the original was kept ({told})")
    return done.notes, done.failures


def _warn(what: str) -> None:
    warnings.warn(f"attnfx: {what}", RuntimeWarning, stacklevel=5)


def _why(problem: Exception) -> str:
    if isinstance(problem, CannotVerify):
        return str(problem)
    text = (str(problem).splitlines() or [""])[0]
    if isinstance(problem, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return f"{type(problem).__name__}: {text}"


def _own(example_inputs: Sequence[Any], trial: Trial) -> list[Any]:
    """Detach the inputs, and copy storages that the graph may write; tensors that share a storage share its copy."""
    strange = next((x for x in example_inputs if isinstance(x, Tensor) and not _plain(x)), None)
    if strange is not None:
        raise CannotVerify(f"an input is a {type(strange).__name__}, not a plain tensor")
    written = Facts(trial.gm).written
    holders = [n for n in trial.gm.graph.nodes if n.op == "placeholder"]
    opaque = any(isinstance(n.target, HigherOrderOperator) for n in trial.gm.graph.nodes)
    copies: dict[int, torch.UntypedStorage] = {}
    changed = {
        x.untyped_storage()._cdata
        for x, n in zip(example_inputs, holders, strict=True)
        if isinstance(x, Tensor) and (opaque or n in written)
    }

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return number(x) if isinstance(x, torch.SymInt) else x
        held = x.untyped_storage()
        if held._cdata not in changed:
            return x.detach()
        copy = copies.setdefault(held._cdata, held.clone())
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(copy, x.storage_offset(), x.shape, x.stride())

    return [own(x) for x in example_inputs]


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided


@dataclass
class _Outcome:
    """The results so far, by the names of the pairs."""

    options: Options
    training: bool
    notes: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


class _Run(Interpreter):
    """Run a trial's graph and compare each pair once its inputs are computed; stop computing after the last pair."""

    def __init__(self, trial: Trial, done: _Outcome, whole: bool = False):
        super().__init__(trial.gm)
        self.trial, self.done, self.whole = trial, done, whole or bool(trial.bodies)
        self.waiting: dict[str, list[Pair]] = {}
        self.wanted: Counter[str] = Counter()
        for pair in trial.pairs:
            self.waiting.setdefault(pair.at, []).append(pair)
            self.wanted.update(set(pair.inputs))
        self.held: dict[str, Any] = {}
        self.regions: list[Any] = []

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        try:
            return super().run(*args)
        finally:
            for region in reversed(self.regions):
                region.__exit__(None, None, None)

    def run_node(self, n: Node) -> Any:
        if not self.waiting and not self.whole:
            return None
        self.current = n
        result = super().run_node(n)
        if n.name in self.wanted:
            self.held[n.name] = result
        for pair in self.waiting.pop(n.name, ()):
            self._compare(pair)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.amp.autocast_mode._enter_autocast:
            self.regions.append(super().call_function(target, args, kwargs))
            return self.regions[-1]
        if target is torch.amp.autocast_mode._exit_autocast:
            self.regions.remove(args[0])
        elif isinstance(target, HigherOrderOperator) and target.name() in BODIES:
            at, inputs = BODIES[target.name()](*args)
            body = self.trial.bodies.get(str(self.current.args[at].target))  # type: ignore[union-attr]
            if body is not None and body.pairs:
                return _Run(body, self.done, whole=True).run(*inputs)
        return super().call_function(target, args, kwargs)

    def _compare(self, pair: Pair) -> None:
        inputs = [self.held[name] for name in pair.inputs]
        for name in set(pair.inputs):
            self.wanted[name] -= 1
            if not self.wanted[name]:
                del self.held[name]
        taught = [t and self.done.training for t in pair.taught]
        try:
            _require_memory(pair, inputs, any(taught))
            found = repro.differences(pair.original, pair.rewritten, inputs, taught, pair.results)
        except Exception as problem:
            self.done.notes[pair.name] = f"not verified: {_why(problem)}"
            return
        wrong = [d for d in found if d.problem]
        if not wrong:
            self.done.notes[pair.name] = _praise(found, len(pair.results))
            return
        script = _script(self.done.options, pair, inputs, taught, found)
        self.done.notes[pair.name] = "failed on its first call"
        self.done.failures[pair.name] = Failure(pair, f"{wrong[0].name}: {wrong[0].problem}", script)


def _praise(found: list[Difference], results: int) -> str:
    parts = []
    for what, some in (("forward", found[:results]), ("gradient", found[results:])):
        worst = max((d for d in some if d.name != "dropout"), key=lambda d: d.error, default=None)
        if worst is not None:
            parts.append(f"{what} error {worst.error:.2g} (eager's {worst.eager:.2g})")
    return f"verified on the first call: {', '.join(parts)}"


def _script(
    options: Options, pair: Pair, inputs: Sequence[Any], taught: Sequence[bool], found: list[Difference]
) -> Path | None:
    home = options.dump_dir or cache.directory()
    try:
        return repro.write(home / "verify", replace(pair, taught=tuple(taught)), inputs, found)
    except OSError as problem:
        warnings.warn(
            f"attnfx: the script that reproduces a mismatch could not be written under {home}: {problem}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _require_memory(pair: Pair, inputs: Sequence[Any], training: bool) -> None:
    """Raise CannotVerify if the original's values in float64 would exceed the free memory: on a CPU, running out of
    memory would kill the process."""
    elements, largest = weight(pair.original)
    needed = 8 * (elements if training else 4 * largest)
    device = next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))
    free = free_on(device)
    if free is not None and needed > free:
        raise CannotVerify(f"its scores in float64 would take {needed >> 20} MiB, and {free >> 20} MiB are free")
