"""`attnfx.plan`: predict a step's memory and time on a device, present or not, and fit the step into a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from os import PathLike, fspath
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from attnfx.errors import OptionError
from attnfx.memory import byte_size as budgets
from attnfx.memory import optimizer as optimizers
from attnfx.memory.byte_size import text
from attnfx.options import Options, check_names
from attnfx.planning.capture import Captured, capture
from attnfx.planning.limits import Limits
from attnfx.planning.peak import Resident, fitting
from attnfx.planning.prediction import Prediction
from attnfx.planning.strategies import Strategy, strategies
from attnfx.report.report import Report
from attnfx.targets import Target
from attnfx.targets.available import detected, free_bytes


class Plan(Prediction):
    """Decisions for a model under a memory budget, with the predicted timeline: a `Prediction` with output methods.

    `str(plan)` is a table of the peak, limits and decisions.
    """

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, force_terminal=False, no_color=True)
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get().rstrip()

    def __rich__(self):  # type: ignore[no-untyped-def]
        from attnfx.planning.table import table

        return table(self)

    def plot(self, path: str | PathLike[str]) -> None:
        """Plot the timeline, in GiB over allocator events, to an image file; an existing file is replaced.

        Raises:
            ImportError: Matplotlib is missing; the extra "plot" installs it.
            ValueError: Matplotlib does not know the image format of the path's suffix.
            OSError: The file cannot be written.
        """
        from attnfx.planning.table import plot

        plot(self, path)

    def to_html(self, path: str | PathLike[str], force: bool = False) -> None:
        """Write the report with the timeline as one HTML page that works offline.

        Raises FileExistsError if the file exists, unless `force`.
        """
        from attnfx.report.html import write

        step = "a training step" if self.train else "a forward pass"
        caption = f"Bytes allocated over {step} on {self.target.name}; {text(self.peak_bytes)} at the peak."
        write(self.report.to_data(), fspath(path), force, [m.bytes for m in self.timeline], caption)

    def snapshot(self, path: str | PathLike[str]) -> None:
        """Write the timeline as a file for PyTorch's memory viewer (pytorch.org/memory_viz); replaces an existing file.

        The format is the pickle of `torch.cuda.memory._dump_snapshot`. Raises OSError if the file cannot be written.
        """
        from attnfx.planning.snapshot import snapshot

        snapshot(self.resident.around(self.strategy.events), path)


def plan(model: Callable[..., Any], *, target: str | Target = "auto", memory_budget: int | float | str | None = None,
         train: bool | None = None, optimizer: str | int = "none", **options: Any) -> Callable[..., Plan]:  # fmt: skip
    """Plan a step of `model` on example inputs without running it: parameters and inputs may be on "meta".

    `attnfx.plan(model, target="rtx4090", memory_budget="24GiB", train=True)(*args, **kwargs)` returns a `Plan`.

    model           a module or function; it is traced on fake tensors
    target          a device's name, the path of a JSON file, or an `attnfx.Target`; "auto" is the CPU for a model with
                    parameters on the CPU or on "meta", else the present GPU, or the CPU of a machine without one
    memory_budget   bytes, "16GiB", or a fraction of the target's memory; None is all of it, without any changes to fit
                    it; "auto" is the free memory of the present device
    train           whether a backward pass follows; None means the model's training mode decides
    optimizer       none, sgd, momentum, adam, adamw, adam8bit, adamw8bit, or the bytes of its state, such as "3GiB"
    options         the fields of `Options`; a refused site is not an error here, even with `strict`

    Raises:
        OptionError: an option is unknown or invalid, the budget exceeds the target's memory, or nothing can be planned.
        BudgetError: the step does not fit; the message has the smallest possible peak and its contents.
    """
    check_names(options, ("train", "optimizer"))
    chosen = Options.make({**options, "target": target}).without_timing()
    wanted = budgets.check("memory_budget", memory_budget)
    keeps = optimizers.given(optimizer)
    if train not in (None, True, False):
        raise OptionError(f"train: {train!r} is not valid; did you mean {bool(train)}? Valid values: None, True, False")

    def run(*args: Any, **kwargs: Any) -> Plan:
        device = chosen.target if isinstance(chosen.target, Target) else detected(_device(model))
        # the graphs of a plan are on the CPU: they do not tell for which device to decide
        decided = chosen if device.kind == "cpu" else replace(chosen, target=device)
        training = train if train is not None else bool(getattr(model, "training", False))
        limit = None
        if wanted is not None:
            free = free_bytes(device) if chosen.target == "auto" else device.memory
            limit = budgets.in_bytes(wanted, device.memory, free, device.name)

        def captured(inputs: Any, options: Options, told: Sequence[Report] = ()) -> list[Captured]:
            return capture(model, inputs[0], inputs[1], options, training, told)

        inputs = args, kwargs
        first = captured(inputs, decided)
        notes = _covered(first)
        first = [c for c in first if not c.problem]
        resident = _resident(model, inputs, keeps, training, device.kind == "cpu")
        more = cache(lambda: [c for c in captured(inputs, replace(decided, rewrite="always")) if not c.problem])

        def ways(
            graphs: Sequence[Captured] = first, rewritten: Callable[[], Sequence[Captured]] = more
        ) -> Iterable[Strategy]:
            return strategies(graphs, device, chosen.inner == "inductor", rewritten)

        way = fitting(ways(), limit, resident, device, training)

        @cache
        def limits() -> Limits:
            lowest = None
            if limit is not None:
                *_, lowest = ways()
            most = limit if limit is not None else device.memory
            return Limits(way, inputs, resident, most, captured, ways, lowest, notes)

        return Plan(device, limit, training, way, resident, notes, limits)

    return run


def _covered(captured: Sequence[Captured]) -> list[str]:
    """Return the plan's notes on the graphs. Raises OptionError if none of them can be planned."""
    if not captured:
        raise OptionError("Dynamo captured no graph of this call, so there is nothing to plan")
    if all(c.problem for c in captured):
        raise OptionError(f"there is nothing to plan: the graph {captured[0].problem}")
    notes = [f"graph {n}: {note}" for n, c in enumerate(captured) for note in c.report.notes]
    if len(captured) > 1:
        notes.append(f"Dynamo captured {len(captured)} graphs; the Python code between them is not planned")
    return notes + [f"graph {n} {c.problem}" for n, c in enumerate(captured) if c.problem]


def _device(model: Any) -> str | None:
    if isinstance(model, nn.Module):
        kinds = {p.device.type for p in model.parameters()}
        if "cpu" in kinds or "meta" in kinds:
            return "cpu"
    return None


def _resident(model: Any, inputs: Any, keeps: int | optimizers.Optimizer, train: bool, cpu: bool) -> Resident:
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    given = {id(x): x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)}.values()

    def sizes(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
        return tuple(x.numel() * x.element_size() for x in tensors)

    state = scratch = 0
    if isinstance(keeps, int):
        state = keeps if train else 0
    elif train:
        wanted = [(p.numel(), p.numel() * p.element_size()) for p in parameters if p.requires_grad]
        state, scratch = optimizers.state_bytes(keeps, wanted), optimizers.step_bytes(keeps, wanted, cpu)
    held = sizes(parameters), sizes(buffers)
    return Resident(sum(held[0]), sum(held[1]), state, scratch, held[0] + held[1], sizes(given))
