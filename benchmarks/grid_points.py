"""Define the points of the grids that benchmarks/grid.py measures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Point:
    """One program and shape: T queries of H heads and S keys of G heads, all of width D, in a batch of B."""

    program: str
    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    dtype: str
    train: bool


KEY = tuple(field.name for field in fields(Point))
# program -> lengths, in float32: forward passes, then training steps
FORWARD = {
    "plain": (256, 512, 1024, 2048),
    "plain_upcast": (64, 128, 256, 512, 1024, 2048, 4096),
    "causal": (64, 128, 256, 512, 1024, 2048, 4096),
    "window": (128, 256, 512, 1024, 2048, 4096),
    "padding": (128, 512, 1024, 2048),
    "padding_upcast": (128, 256, 512, 1024, 2048),
    "alibi": (128, 512, 2048),
    "relative": (128, 512),
    "masked": (128, 512, 2048),
    "softcap": (128, 512, 2048),
    "grouped": (128, 512),
    "fused_masked": (512, 2048),
}
TRAINING = {
    "plain": (512,),
    "plain_upcast": (128, 512, 1024),
    "causal": (128, 256, 512, 1024),
    "window": (256, 512, 1024),
    "padding_upcast": (256, 512),
    "alibi": (256,),
    "relative": (128, 512),
    "masked": (512,),
    "softcap": (128, 512),
    "grouped": (256, 1024),
    "dropout": (128, 256, 512, 1024),
    "fused_masked": (256, 1024),
}
HALVES = {"plain_upcast": (512,), "causal": (128, 512, 2048), "padding_upcast": (512,)}
HALVES_TRAINING = {"causal": (256, 1024), "dropout": (512,)}
BATCHES = {"plain_upcast": (128, 512), "causal": (64, 256, 512), "padding_upcast": (128, 512)}
BATCHES_TRAINING = {"plain_upcast": (128, 512), "causal": (128,), "dropout": (128,)}


def points() -> Iterator[Point]:
    def each(table: dict[str, tuple[int, ...]], batch: int, dtype: str, train: bool) -> Iterator[Point]:
        for program, lengths in table.items():
            for t in lengths:
                heads = 4 if t == 4096 else 12
                yield Point(
                    program, batch, heads, heads // 4 if program == "grouped" else heads, t, t, 64, dtype, train
                )

    yield from each(FORWARD, 1, "float32", False)
    yield from each(BATCHES, 8, "float32", False)
    yield from each(HALVES, 1, "bfloat16", False)
    yield from each(TRAINING, 1, "float32", True)
    yield from each(BATCHES_TRAINING, 8, "float32", True)
    yield from each(HALVES_TRAINING, 1, "bfloat16", True)
    for program in ("plain_upcast", "relative"):
        yield Point(program, 64, 3, 3, 49, 49, 32, "float32", False)  # windows of an image
    for program in ("plain_upcast", "causal"):
        for width in (32, 128):
            yield Point(program, 1, 12, 12, 512, 512, width, "float32", False)
        yield Point(program, 1, 12, 12, 2048, 2048, 128, "float32", False)
        yield Point(program, 1, 12, 12, 512, 512, 128, "float32", True)
    for program in ("plain_upcast", "padding_upcast"):
        for t, s in ((1, 1024), (1, 4096), (32, 2048)):  # few queries against a cache
            yield Point(program, 1, 12, 12, t, s, 64, "float32", False)


# The points with the tier "flex", forward passes: program -> lengths, in float32 and in bfloat16
FLEX = {
    "plain_upcast": (128, 512, 2048),
    "causal": (256, 2048),
    "window": (2048,),
    "padding_upcast": (512, 2048),
    "alibi": (512, 2048),
    "relative": (512,),
    "softcap": (256, 2048),
    "masked": (512,),
}
FLEX_HALVES = {"causal": (512, 2048), "plain_upcast": (512,)}


def flex_points() -> Iterator[Point]:
    for table, dtype in ((FLEX, "float32"), (FLEX_HALVES, "bfloat16")):
        for program, lengths in table.items():
            yield from (Point(program, 1, 8, 8, t, t, 64, dtype, False) for t in lengths)
    for program in ("plain_upcast", "causal"):
        yield Point(program, 8, 8, 8, 256, 256, 64, "float32", False)
        yield Point(program, 1, 8, 8, 1024, 1024, 128, "float32", False)
    yield Point("plain_upcast", 1, 8, 8, 1, 2048, 64, "float32", False)


# Decode steps: (B, H, G, T, S, D) and dtype -> the spellings of the groups, and the caches. Batches 1 to 16, 1 to 16
# queries, 512 to 32768 keys.
GROUPED, SPELLED = ("expand", "broadcast"), ("interleave", "expand", "broadcast")
CACHES = ("static", "growing")
DECODING = {
    (1, 32, 8, 1, 512, 128, "float32"): (SPELLED, CACHES),
    (1, 32, 8, 1, 4096, 128, "float32"): (SPELLED, CACHES),
    (1, 32, 8, 1, 16384, 128, "float32"): (GROUPED, CACHES),
    (1, 32, 8, 1, 1024, 128, "bfloat16"): (SPELLED, ("static",)),
    (1, 32, 8, 1, 4096, 128, "bfloat16"): (GROUPED, CACHES),
    (1, 32, 8, 4, 2048, 128, "float32"): (SPELLED, CACHES),
    (1, 32, 8, 16, 2048, 128, "float32"): (SPELLED, ("static",)),
    (1, 32, 8, 4, 2048, 128, "bfloat16"): (("expand",), ("static",)),
    (1, 32, 8, 16, 2048, 128, "bfloat16"): (("expand",), ("static",)),
    (4, 14, 2, 1, 1024, 64, "float32"): (GROUPED, ("static",)),
    (4, 14, 2, 1, 4096, 64, "float32"): (GROUPED, ("static",)),
    (16, 14, 2, 1, 1024, 64, "float32"): (GROUPED, ("static",)),
    (16, 14, 2, 1, 4096, 64, "float32"): (GROUPED, ("static",)),
    (16, 16, 4, 1, 512, 64, "float32"): (SPELLED, ("growing",)),
    (4, 16, 4, 1, 2048, 64, "bfloat16"): (SPELLED, ("static",)),
    (1, 12, 12, 1, 512, 64, "float32"): (("expand",), CACHES),
    (1, 12, 12, 1, 1024, 64, "float32"): (("expand",), CACHES),
    (1, 12, 12, 1, 4096, 64, "float32"): (("expand",), CACHES),
    (1, 12, 12, 1, 32768, 64, "float32"): (("expand",), CACHES),
    (8, 12, 12, 1, 1024, 64, "float32"): (("expand",), CACHES),
    (1, 12, 12, 16, 2048, 64, "float32"): (("expand",), CACHES),
    (1, 12, 12, 1, 4096, 64, "bfloat16"): (("expand",), CACHES),
    (1, 16, 1, 1, 2048, 64, "float32"): (GROUPED, ("static",)),
    (1, 16, 1, 1, 32768, 64, "float32"): (GROUPED, ("static",)),
    (4, 16, 1, 4, 2048, 64, "float32"): (GROUPED, ("static",)),
}


def decode_points() -> Iterator[Point]:
    for (*shape, dtype), (spellings, caches) in DECODING.items():
        for spelling in spellings:
            for cache in caches:
                yield Point(f"decoding:{spelling}:{cache}", *shape, dtype, False)


# Held-out points, whose shapes are not in the grid: B, H, G, T, S, D.
HELD_OUT = {
    ("float32", False): {
        "plain": ((2, 4, 4, 700, 700, 96),),
        "plain_upcast": ((4, 12, 12, 197, 197, 48), (2, 8, 8, 64, 1500, 64), (8, 16, 16, 1, 777, 64)),
        "causal": ((2, 4, 4, 800, 800, 80), (1, 8, 8, 96, 96, 160)),
        "window": ((1, 8, 8, 1500, 1500, 64), (4, 6, 6, 200, 200, 32)),
        "padding": ((8, 6, 6, 77, 77, 64), (2, 8, 8, 400, 400, 96)),
        "padding_upcast": (
            (2, 8, 8, 16, 1500, 64),
            (4, 8, 8, 8, 512, 96),
            (16, 12, 12, 32, 32, 32),
            (1, 16, 16, 640, 640, 40),
        ),
        "alibi": ((2, 8, 8, 384, 384, 80),),
        "relative": ((2, 6, 6, 200, 200, 32),),
        "masked": ((1, 8, 8, 700, 700, 128),),
        "softcap": ((1, 8, 8, 640, 640, 96),),
        "grouped": ((1, 16, 4, 900, 900, 128),),
    },
    ("bfloat16", False): {
        "plain_upcast": ((2, 8, 8, 400, 400, 64),),
        "padding_upcast": ((2, 12, 12, 200, 200, 64),),
        "causal": ((1, 8, 8, 1200, 1200, 96),),
    },
    ("float32", True): {
        "plain_upcast": ((4, 8, 8, 197, 197, 64), (2, 8, 8, 100, 400, 64)),
        "causal": ((2, 6, 6, 300, 300, 80), (1, 4, 4, 1500, 1500, 64)),
        "dropout": ((2, 8, 8, 200, 200, 64), (1, 6, 6, 700, 700, 32)),
        "padding_upcast": ((4, 8, 8, 160, 160, 64),),
        "window": ((1, 8, 8, 900, 900, 64),),
        "softcap": ((1, 6, 6, 300, 300, 64),),
        "grouped": ((1, 8, 2, 600, 600, 64),),
    },
    ("bfloat16", True): {"causal": ((1, 8, 8, 600, 600, 64),)},
}


def held_out() -> Iterator[Point]:
    for (dtype, train), programs in HELD_OUT.items():
        for program, shapes in programs.items():
            yield from (Point(program, *shape, dtype, train) for shape in shapes)


def groups(some: Sequence[Point]) -> list[list[Point]]:
    """Group points by program, dtype and direction; a group shares a process."""
    out: dict[tuple[str, str, bool], list[Point]] = {}
    for p in some:
        out.setdefault((p.program, p.dtype, p.train), []).append(p)
    return list(out.values())


def key_of(point: Any) -> str:
    return json.dumps([point[name] for name in KEY])
