"""Compile the kernels for GPUs that are not present, and print a JSON list of facts about their machine code.

This is a separate script, because a process in which Triton interprets cannot compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import mask_summary as summarise
from attnfx.kernels.flash.host import tiles
from attnfx.kernels.flash.host.backward import Backward
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AttentionSpec, B, Capture, H, I, J

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SLOPES, PADDING = A.load(0, [H], "f"), A.load(1, [B, J], "b")


def specs(head_dim):
    scaled = A.mul(A.const(head_dim**-0.5), A.DOT)
    plain = AttentionSpec(score=scaled, out_dtype="bfloat16")
    biased = A.add(scaled, A.mul(SLOPES, A.to_float(A.sub(J, I))))
    keep = A.and_(A.ge(I, J), A.lt(A.sub(I, J), A.const(1024)), PADDING)
    captures = (Capture("f", 1, True), Capture("b", 2))
    masked = AttentionSpec(
        score=A.where(keep, biased, A.const(-3e38)), out_dtype="bfloat16", dropout=0.1, captures=captures
    )
    return {"plain": (plain, ()), "masked": (masked, captures)}


def calls(head_dim, queries=2048):
    for name, (spec, captures) in specs(head_dim).items():
        if name == "masked" and head_dim != 64:  # takes long and adds nothing
            continue
        x = torch.empty(2, 8, 2048, head_dim, dtype=torch.bfloat16, device="meta")
        key = x[:, :2] if name == "masked" else x
        given = (torch.empty(8, device="meta"), torch.empty(2, 2048, dtype=torch.bool, device="meta"))
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        yield name, Call(spec, x[:, :, :queries], key, key, given[: len(captures)], (), seed if spec.random else None)


def launches(capability, head_dim):
    for name, call in calls(head_dim):
        logsumexp = torch.empty(call.query.shape[:3], device="meta")
        tile = tiles.pick(tiles.forward_table(call.spec), capability, head_dim)
        yield f"forward {name}", launch.forward_launch(call, call.query, logsumexp, tile, capability)
        pair = tiles.pick(tiles.backward_table(call.spec), capability, head_dim)
        back = Backward(call, call.query, call.query, logsumexp, pair, capability)
        yield f"backward keys {name}", back.keys_launch(call.key, call.value)
        yield f"backward rows {name}", back.rows_launch(call.query)
        if call.spec.captures:
            yield f"backward slopes {name}", back.rows_launch(logsumexp, 0)
            for space in ("diagonal", "pair"):
                leaf = replace(back.program.leaves[0], space=space)
                yield f"backward {space} {name}", back.pairs_launch(logsumexp, 0, leaf)
    for name, call in calls(head_dim, 1):
        logsumexp = torch.empty(call.query.shape[:3], device="meta")
        tile = tiles.pick(tiles.DECODE, capability, head_dim)
        yield f"decode {name}", split.launches(call, call.query, logsumexp, tile, 132, capability)[0]


def summarised(capability):
    """Yield the kernels for a mask m[b, i, j] with a summary: the summary, the lists of tiles, and their users."""
    scaled = A.mul(A.const(0.125), A.DOT)
    for name, dtype, load in (("kept", torch.bool, "b"), ("added", torch.bfloat16, "f")):
        held = A.load(0, [B, I, J], load)
        score = A.where(held, scaled, A.const(-3e38)) if load == "b" else A.add(scaled, held)
        spec = AttentionSpec(score=score, out_dtype="bfloat16", captures=(Capture(load, 3),))
        for queries in (2048, 1):
            key = torch.empty(2, 8, 2048, 64, dtype=torch.bfloat16, device="meta")
            mask = torch.empty(2, queries, 2048, dtype=dtype, device="meta")
            found, x = summary.of(spec), key[:, :, :queries]
            over = summarise.call_of([mask], (2, 8, queries, 2048), found.spec)
            states = torch.empty(summary.shape(found.spec, over.sizes), dtype=torch.uint8, device="meta")
            call = Call(spec, x, key, key, (mask,), summary=states)
            logsumexp = torch.empty(x.shape[:3], device="meta")
            if queries == 1:
                tile = tiles.pick(tiles.DECODE, capability, 64)
                decoded = split.launches(call, x, logsumexp, tile, 132, capability)[0]
                yield f"decode {name}", decoded
                yield f"lists for decode {name}", decoded.before[0]
                continue
            tile = tiles.pick(tiles.forward_table(spec), capability, 64)
            forward = launch.forward_launch(call, x, logsumexp, tile, capability)
            pair = tiles.pick(tiles.backward_table(spec), capability, 64)
            back = Backward(call, x, x, logsumexp, pair, capability)
            yield f"summary {name}", summarise.launch(over, states, tiles.Tile(0, 0, 4, 1))
            yield f"lists {name}", forward.before[0]
            yield f"forward {name}", forward
            yield f"backward keys {name}", back.keys_launch(key, key)
            yield f"backward rows {name}", back.rows_launch(x)


def biased(capability):
    """Yield the kernels for a bias by head, row and key, which is loaded for every score."""
    score = A.add(A.mul(A.const(0.125), A.DOT), A.load(0, [H, I, J], "f"))
    spec = AttentionSpec(score=score, out_dtype="bfloat16", captures=(Capture("f", 3, True),))
    x = torch.empty(2, 8, 2048, 64, dtype=torch.bfloat16, device="meta")
    call = Call(spec, x, x, x, (torch.empty(8, 2048, 2048, dtype=torch.bfloat16, device="meta"),))
    logsumexp = torch.empty(x.shape[:3], device="meta")
    back = Backward(call, x, x, logsumexp, tiles.pick(tiles.backward_table(spec), capability, 64), capability)
    yield (
        "forward biased",
        launch.forward_launch(call, x, logsumexp, tiles.pick(tiles.forward_table(spec), capability, 64), capability),
    )
    yield "backward keys biased", back.keys_launch(x, x)
    yield "backward rows biased", back.rows_launch(x)


def masks(capability, head_dim):
    """Yield the most common programs on the wide tiles: causal, padding with its summary, linear biases, a bias of each
    score and a bias by distance."""
    size = 4096
    apart = A.add(A.maximum(A.minimum(A.sub(J, I), A.const(128)), A.const(-128)), A.const(128))
    dot, causal = A.mul(A.const(head_dim**-0.5), A.DOT), A.ge(I, J)
    linear = A.add(dot, A.mul(SLOPES, A.to_float(A.sub(J, I))))
    bias = A.add(dot, A.load(0, [H, I, J], "f"))
    x = torch.empty(2, 8, size, head_dim, dtype=torch.bfloat16, device="meta")
    bf16 = dict(dtype=torch.bfloat16, device="meta")
    for name, score, kinds, captures in (
        ("causal", A.where(causal, dot, A.const(-3e38)), (), ()),
        ("padding", A.where(A.load(0, [B, J], "b"), dot, A.const(-3e38)), (Capture("b", 2),),
         (torch.empty(2, size, dtype=torch.bool, device="meta"),)),
        ("alibi", A.where(causal, linear, A.const(-3e38)), (Capture("f", 1, True),), (torch.empty(8, **bf16),)),
        ("bias", bias, (Capture("f", 3, True),), (torch.empty(8, size, size, **bf16),)),
        ("relative", A.add(dot, A.load(0, [apart, H], "f")), (Capture("f", 2, True),), (torch.empty(257, 8, **bf16),)),
    ):  # fmt: skip
        if head_dim != 128 and name in ("alibi", "bias"):  # to save time
            continue
        spec = AttentionSpec(score=score, captures=kinds, out_dtype="bfloat16")
        call = Call(spec, x, x, x, captures)
        found = summary.of(spec) if name == "padding" else None
        if found is not None:
            over = summarise.call_of(captures, (2, 8, size, size), found.spec)
            shape = summary.shape(found.spec, over.sizes)
            call = replace(call, summary=torch.empty(shape, dtype=torch.uint8, device="meta"))
        logsumexp = torch.empty(x.shape[:3], device="meta")
        tile = tiles.pick(tiles.forward_table(spec), capability, head_dim)
        yield f"forward {name}", launch.forward_launch(call, x, logsumexp, tile, capability)
        back = Backward(call, x, x, logsumexp, tiles.pick(tiles.backward_table(spec), capability, head_dim), capability)
        yield f"backward keys {name}", back.keys_launch(x, x)
        yield f"backward rows {name}", back.rows_launch(x)


def loops(listing):
    """Return the instructions of each innermost loop that has a matrix instruction."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?(\S+)([^;]*);", listing)
    at = {int(address, 16): n for n, (address, _, _) in enumerate(code)}
    spans = []
    for n, (_, op, rest) in enumerate(code):
        jump = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if jump and int(jump[1], 16) in at and at[int(jump[1], 16)] < n:
            spans.append((at[int(jump[1], 16)], n))
    bodies = []
    for a, b in spans:
        if not any((a, b) != s and a <= s[0] and s[1] <= b for s in spans):
            ops = [op for _, op, _ in code[a : b + 1]]
            if any(re.match(r"HGMMA|HMMA|UTC\wMMA", op) for op in ops):
                bodies.append(ops)
    return bodies


def main():
    found = []
    others = {"loads": lambda capability: (*summarised(capability), *biased(capability))}
    others |= {f"masks {n}": partial(masks, head_dim=n) for n in (64, 128, 256)}
    for capability in map(int, sys.argv[1].split(",")):
        for what in sys.argv[2].split(","):
            head_dim = int(what) if what.isdigit() else 0
            for name, made in launches(capability, head_dim) if head_dim else others[what](capability):
                built = made.compile(capability)
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(built.asm["cubin"])
                    file.flush()
                    run = [str(CUOBJDUMP), "-sass", file.name]
                    listing = subprocess.run(run, capture_output=True, text=True, check=True).stdout
                bodies = loops(listing)
                steady = min(bodies, key=len, default=[])
                ptx = built.asm["ptx"]
                matrix = [op for op in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if op in ptx]
                found.append(
                    dict(
                        name=name, capability=capability, head_dim=head_dim, shared=built.metadata.shared,
                        matrix=matrix, loops=len(bodies),
                        spills=sum(op.startswith(("STL", "LDL")) for op in steady),
                    )
                )  # fmt: skip
    print(json.dumps(found))


def for_amd():
    """List facts about the plain kernels' code for gfx942, with small tiles; none of the tables has tiles for it."""
    found, tile = [], tiles.Tile(32, 32, 4, 1)
    (call,), (one,) = ([c for name, c in calls(64, n) if name == "plain"] for n in (2048, 1))
    logsumexp = torch.empty(call.query.shape[:3], device="meta")
    back = Backward(call, call.query, call.query, logsumexp, (tile, tile), 80)
    for name, made in {
        "forward": launch.forward_launch(call, call.query, logsumexp, tile, 80),
        "keys": back.keys_launch(call.key, call.value),
        "rows": back.rows_launch(call.query),
        "decode": split.launches(one, one.query, logsumexp[:, :, :1], tile, 132, 80)[0],
    }.items():
        built = made.compile(GPUTarget("hip", "gfx942", 64))
        spilled = sum(map(int, re.findall(r"vgpr_spill_count:\s*(\d+)", built.asm["amdgcn"])))
        found.append(
            dict(name=name, shared=built.metadata.shared, matrix="v_mfma" in built.asm["amdgcn"], spills=spilled)
        )
    print(json.dumps(found))


def compilations():
    """Count the forward kernels that are compiled for one program at several lengths, with a fake driver."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    triton.runtime.driver.set_active(driver)
    spec, _ = specs(64)["plain"]
    counts = []
    for length in (1024, 1000, 1001, 1):
        x = torch.empty(2, length, 8, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        logsumexp = torch.empty(2, 8, length, device="meta")
        tile = tiles.pick(tiles.FORWARD, 90, 64)
        made = launch.forward_launch(Call(spec, x, x, x, (), (), None), x, logsumexp, tile, 90)
        options = dict(num_warps=tile.warps, num_stages=tile.stages)
        made.kernel.warmup(**made.arguments, **made.constants, **options, grid=(1,))
        counts.append(len(made.kernel.device_caches[0][0]))
    print(json.dumps(counts))


if __name__ == "__main__":
    {"lengths": compilations, "gfx942": for_amd}.get(sys.argv[1], main)()
