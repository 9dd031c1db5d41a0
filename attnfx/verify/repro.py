"""Write a script that reproduces a failed verification, and provide the function that the script calls."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, symbolic_trace

from attnfx.kernels import operators  # noqa: F401  (the import registers the operators that a script calls)
from attnfx.passes.fx.dropout import drops, without_dropout
from attnfx.passes.rewrite.subgraph import Pair
from attnfx.verify.compare import Difference, compare, compare_dropout

SCRIPT = '''\
"""Compare the attention at {where} with its rewrite by attnfx, on the tensors of the call on which they differed.

Run `python {name}/repro.py`. It needs attnfx and the files beside it, and exits with 1 if the two differ.
{found}
"""

import operator
import sys
from math import inf, nan
from pathlib import Path

import torch
from torch import device

from attnfx.verify.repro import show


class Original(torch.nn.Module):
{original}

class Rewritten(torch.nn.Module):
{rewritten}

if __name__ == "__main__":
    sys.exit(show(Original(), Rewritten(), Path(__file__).parent / "tensors.pt"))
'''


def write(folder: Path, pair: Pair, inputs: Sequence[Any], differences: Sequence[Difference]) -> Path:
    """Write the script, its tensors and the spec to a new folder `<site>_N` in `folder`; return the script's path.

    Raises OSError if it cannot be written.
    """
    home = next(p for n in itertools.count() if not (p := folder / f"{pair.site.name}_{n}").exists())
    home.mkdir(parents=True)
    held = [x.detach().cpu() if isinstance(x, torch.Tensor) else x for x in inputs]
    devices = [str(x.device) if isinstance(x, torch.Tensor) else None for x in inputs]
    torch.save(
        {"inputs": held, "devices": devices, "taught": list(pair.taught), "results": list(pair.results),
         "autocast": _autocast(inputs)},
        home / "tensors.pt",
    )  # fmt: skip
    if pair.site.spec is not None:
        (home / "spec.json").write_text(pair.site.spec.to_json())
    script = home / "repro.py"
    script.write_text(
        SCRIPT.format(
            where=pair.site.where or pair.site.name, name=home.name,
            found="\n".join(f"{d.name}: {d.problem}" for d in differences if d.problem),
            original=_code(pair.original), rewritten=_code(pair.rewritten),
        )
    )  # fmt: skip
    return script


def differences(
    original: GraphModule, rewritten: GraphModule, inputs: Sequence[Any], taught: Sequence[bool], names: Sequence[str]
) -> list[Difference]:
    """Compare the functions with dropout removed; if they agree, also compare the dropout, if there is any."""
    calm, calm_rewritten = without_dropout(original), without_dropout(rewritten)
    found = compare(calm, calm_rewritten, inputs, taught, names)
    if drops(original) and not any(d.problem for d in found):
        wrong = compare_dropout(original, rewritten, inputs)
        found.append(Difference("dropout", 0.0, 0.0, wrong))
    return found


def show(original: torch.nn.Module, rewritten: torch.nn.Module, tensors: Path) -> int:
    """Compare on saved tensors and print the differences; return 1 if there are any, else 0."""
    saved = torch.load(tensors, weights_only=True)
    inputs = [x if d is None else x.to(d) for x, d in zip(saved["inputs"], saved["devices"], strict=True)]
    taught, names = saved["taught"], saved["results"]
    device, dtype = saved["autocast"]
    with torch.autocast(device, enabled=dtype is not None, dtype=getattr(torch, dtype) if dtype else None):
        found = differences(symbolic_trace(original), symbolic_trace(rewritten), inputs, taught, names)
    for d in found:
        print(f"{d.name}: {d.problem or 'the same'} (error {d.error:.3g}, eager's {d.eager:.3g})", file=sys.stdout)
    return int(any(d.problem for d in found))


def _autocast(inputs: Sequence[Any]) -> tuple[str, str | None]:
    device = next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return device, None
    return device, str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def _code(gm: GraphModule) -> str:
    lines = gm.graph.python_code("self").src.strip().splitlines()
    return "".join(f"    {line}\n" if line.strip() else "\n" for line in lines)
