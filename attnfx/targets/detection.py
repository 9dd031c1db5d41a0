"""Detect a present device as a target: a GPU by its record or architecture, a CPU by measurement."""

from __future__ import annotations

import difflib
import os
import re
from functools import lru_cache

import torch

from attnfx.errors import OptionError
from attnfx.targets import measure_cpu
from attnfx.targets import sdpa_dispatch as fused
from attnfx.targets.target import RANGES, Target, aliases, key, records, replaced


def detect(device: torch.device | str | None = None) -> Target:
    """Implement `attnfx.targets.detect`."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as problem:
        raise OptionError(f"{device!r} is not a PyTorch device: {problem}") from problem
    if device.type == "cpu":
        return measure_cpu.measured()
    if device.type != "cuda":
        raise OptionError(f"the device {device} cannot be a target: only cuda and cpu devices can")
    if not torch.cuda.is_available():
        raise OptionError(f"this machine has no device {device} to detect; name a target, such as 'h100-sxm'")
    found = _present(torch.cuda.current_device() if device.index is None else device.index)
    backends = present_backends()
    return replaced(found, cudnn=backends.cudnn, flash_attention=backends.flash or "FA2")


def present_backends() -> fused.Backends:
    """Return the kernels of PyTorch's fused operator in this process."""
    cuda = torch.backends.cuda
    built = getattr(cuda, "is_flash_attention_available", lambda: True)()
    flash = _flash() if built and cuda.flash_sdp_enabled() else ""
    return fused.Backends(_cudnn(), flash, cuda.mem_efficient_sdp_enabled())


def _flash() -> str:
    """Return the implementation of FlashAttention that the process activated; "FA2" is PyTorch's own. One that attnfx
    does not know counts as "FA2"."""
    from torch.nn import attention

    found = getattr(attention, "current_flash_attention_impl", lambda: None)()  # since PyTorch 2.11
    return found if found in fused.IMPLEMENTATIONS else "FA2"


def _cudnn() -> int:
    """Return the version of cuDNN if PyTorch prefers its kernel in this process, else 0."""
    version = torch.backends.cudnn.version() or 0
    preferred = (
        version > fused.PREFERRED
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") != "1"
    )
    return version if preferred else 0


@lru_cache(maxsize=64)
def _present(index: int) -> Target:
    return of_properties(torch.cuda.get_device_properties(index))


def of_properties(found: object) -> Target:
    """Return the target of a GPU with properties as returned by `torch.cuda.get_device_properties`."""

    def ask(name: str, otherwise: float = 0) -> float:
        value = getattr(found, name, otherwise)
        return value if isinstance(value, (int, float)) else otherwise

    name = str(getattr(found, "name", "") or "unknown GPU")
    architecture = re.match(r"gfx([0-9a-f]+)", str(getattr(found, "gcnArchName", "")))
    kind = "hip" if architecture else "cuda"
    capability = _number(architecture[1]) if architecture else int(10 * ask("major") + ask("minor"))
    memory, processors = int(ask("total_memory")), int(ask("multi_processor_count", 1))
    record = aliases().get(key(name))
    if record is not None and record.multiprocessors == processors:
        said = {"memory": f"the driver of the device ({name})"}
        return replaced(record, memory=memory, sources={**record.sources, **said})

    near = nearest_architecture(name, kind, capability)
    clock = ask("clock_rate") / 1e6 or near.clock  # kHz
    # two transfers per clock; rate in kHz, width in bits
    bandwidth = 2 * ask("memory_clock_rate") * ask("memory_bus_width") / 8 / 1e6
    if not RANGES["bandwidth"][0] <= bandwidth <= RANGES["bandwidth"][1]:
        bandwidth = near.bandwidth
    scale = processors * clock / (near.multiprocessors * near.clock)
    threads = ask("max_threads_per_multi_processor") / (ask("warp_size") or 32)
    told = dict(
        capability=capability, memory=memory, multiprocessors=processors, clock=clock, bandwidth=bandwidth,
        l2=int(ask("L2_cache_size")) or near.l2, warps=int(threads) or near.warps,
        shared_memory=int(ask("shared_memory_per_multiprocessor")) or near.shared_memory,
        registers=int(ask("regs_per_multiprocessor")) or near.registers,
    )  # fmt: skip
    scaled = dict(
        matrix={dtype: rate * scale for dtype, rate in near.matrix.items()},
        **{field: getattr(near, field) * scale for field in ("fp32", "exponentials", "l2_bandwidth")},
    )
    by = f"estimate: {near.name}'s, scaled by multiprocessors and clock"
    sources = {**near.sources, **dict.fromkeys(told, "the driver of the device"), **dict.fromkeys(scaled, by)}
    note = f"{name} has no record, so its rates are those of {near.name}, scaled by multiprocessors and clock"
    return replaced(near, name=name, kind=kind, note=note, sources=sources, **told, **scaled)


def nearest_architecture(name: str, kind: str, capability: int) -> Target:
    """Return the record of this kind with the largest compute capability up to this one and the most similar name. The
    name matters: GeForce cards have half the matrix rate of other cards of the same capability."""
    same = [r for r in records().values() if r.kind == kind]
    below = [r.capability for r in same if r.capability <= capability] or [min(r.capability for r in same)]
    like = [r for r in same if r.capability == max(below)]
    return max(like, key=lambda r: difflib.SequenceMatcher(None, key(name), key(r.name)).ratio())


def _number(architecture: str) -> int:
    digits = re.match(r"\d+", architecture)
    return int(digits[0]) if digits else 0
