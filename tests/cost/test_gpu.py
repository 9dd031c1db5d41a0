"""Predict the kernels' allocated bytes, times that grow with the work, and rates close to published ones.

The instruction table must be up to date with the kernels."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from attnfx.cost import Question, gpu
from attnfx.cost import instruction_counts as instructions
from attnfx.cost.gpu_kernel import other, other_backward, work
from attnfx.cost.gpu_occupancy import Step, cycles, occupancy
from attnfx.cost.operation_counts import operations
from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import tiles
from attnfx.kernels.flash.host.backward import Backward
from attnfx.kernels.operators.attention import attention
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AttentionSpec, B, Capture, H, I, J
from attnfx.targets import Target

ROOT = Path(__file__).resolve().parents[2]
H100 = Target.by_name("h100-sxm")
SCORE = A.mul(A.const(0.125), A.DOT)
PLAIN = AttentionSpec(score=SCORE, out_dtype="bfloat16")
CAUSAL = AttentionSpec(score=A.where(A.ge(I, J), SCORE, A.const(float("-inf"))), out_dtype="bfloat16")
NEAR = A.and_(A.ge(I, J), A.lt(A.sub(I, J), A.const(256)))
WINDOW = AttentionSpec(score=A.where(NEAR, SCORE, A.const(float("-inf"))), out_dtype="bfloat16")
SLOPES = A.mul(A.load(0, [H], "f"), A.to_float(A.sub(J, I)))
ALIBI = AttentionSpec(score=A.add(SCORE, SLOPES), out_dtype="bfloat16", captures=(Capture("f", 1, True),))


def tensor_mask(*axes):
    score = A.where(A.load(0, axes, "b"), SCORE, A.const(float("-inf")))
    return AttentionSpec(score=score, out_dtype="bfloat16", captures=(Capture("b", len(axes)),))


def ask(spec=PLAIN, T=2048, S=None, B=2, H=8, G=None, D=64, Dv=None, **fields):
    dims = dict(B=B, H=H, G=G or H, T=T, S=S or T, D=D, Dv=Dv or D)
    fields = {"dtype": "bfloat16", "device": "cuda", "refused": {"library": "it runs on the CPU"}} | fields
    return Question(spec, dims, **fields)


def candidates(question, target=H100):
    kept, others = gpu.candidates(question, target)
    return [kept, *others]


def times(question, target=H100):
    return {(c.tier, c.tile, c.splits): c.predicted_ms for c in candidates(question, target)}


# -- bytes --------------------------------------------------------------------------------------
def allocated(launches, *given):
    """Count the bytes of the tensors that launches use, except `given`, each once."""
    found = {}

    def visit(x):
        x = getattr(x, "base", x)  # the tensor of a descriptor
        if isinstance(x, torch.Tensor):
            found[id(x)] = x
        elif isinstance(x, tuple):
            for y in x:
                visit(y)

    for made in launches:
        visit(tuple(made.arguments.values()))
    return sum(x.nbytes for x in found.values() if not any(x is y or x._base is y for y in given))


def on_meta(question):
    d = question.dims
    shapes = ((d["H"], d["T"], d["D"]), (d["G"], d["S"], d["D"]), (d["G"], d["S"], d["Dv"]))
    q, k, v = (torch.empty(d["B"], *s, dtype=torch.bfloat16, device="meta") for s in shapes)
    captures = [torch.empty((8,) * c.ndim, device="meta") for c in question.spec.captures]
    return Call(question.spec, q, k, v, captures)


@pytest.mark.parametrize("spec", [PLAIN, CAUSAL, WINDOW], ids=["plain", "causal", "window"])
@pytest.mark.parametrize("shape", [dict(T=1000), dict(T=512, S=2000, G=2, Dv=128)], ids=str)
def test_forward_bytes_are_those_that_the_launch_allocates(spec, shape):
    question = ask(spec, **shape)
    call = on_meta(question)
    out, logsumexp = call.outputs()
    for c in candidates(question):
        if c.tier == "flash":
            made = launch.forward_launch(call, out, logsumexp, tiles.Tile(*c.tile, c.warps, c.stages), 90)
            assert allocated([made], out, *(call.query, call.key, call.value)) == c.predicted_bytes


@pytest.mark.parametrize("spec", [PLAIN, CAUSAL, ALIBI], ids=["plain", "causal", "slopes"])
def test_training_bytes_are_those_that_both_passes_allocate(spec):
    question = ask(spec, T=1000, training=True)
    call = on_meta(question)
    out, logsumexp = call.outputs()
    run = Backward(call, torch.empty_like(out), out, logsumexp, tiles.pick(tiles.BACKWARD, 90, 64), 90)
    dq, dk, dv = (torch.empty_like(x) for x in (call.query, call.key, call.value))
    passes = [run.delta_launch(), run.rows_launch(dq), run.keys_launch(dk, dv)]
    if spec is ALIBI:  # the gradient of the slopes per row, before its reduction
        passes.append(run.rows_launch(torch.empty(call.query.shape[:3], dtype=torch.float32, device="meta"), 0))
    given = (call.query, call.key, call.value, out, run.grad_out, dq, dk, dv, *call.captures)
    chosen = next(c for c in candidates(question) if c.tier == "flash")
    forward = launch.forward_launch(call, out, logsumexp, tiles.Tile(*chosen.tile, chosen.warps, chosen.stages), 90)
    assert allocated([forward, *passes], *given) == chosen.predicted_bytes


@pytest.mark.parametrize("axes", [(B, J), (B, I, J), (I, J)], ids=["padding", "any", "any, for all"])
@pytest.mark.parametrize("training", [False, True])
def test_bytes_with_a_summary_are_those_of_it_and_of_the_lists_of_tiles(axes, training):
    question = ask(tensor_mask(*axes), T=3000, S=2500, B=4, training=training)
    found = gpu.summary(question, H100, "flash")
    call = on_meta(question)
    states = torch.empty(summary.shape(found.spec, call.sizes), dtype=torch.uint8, device="meta")
    call = replace(call, summary=states)
    out, logsumexp = call.outputs()
    given, back = [call.query, call.key, call.value, out, *call.captures], []
    if training:
        run = Backward(
            call, torch.empty_like(out), out, logsumexp, tiles.pick(tiles.backward_table(call.spec), 90, 64), 90
        )
        grads = [torch.empty_like(x) for x in given[:3]]
        back = [run.delta_launch(), run.rows_launch(grads[0]), run.keys_launch(*grads[1:])]
        given += [run.grad_out, *grads]
    for c in candidates(question):
        if c.tier == "flash":
            made = [launch.forward_launch(call, out, logsumexp, tiles.Tile(*c.tile, c.warps, c.stages), 90), *back]
            assert allocated([x for m in made for x in (*m.before, m)], *given) == c.predicted_bytes
            assert c.saved_bytes == (logsumexp.nbytes + states.nbytes if training else 0)


def test_the_gradient_of_a_bias_is_held_in_slices_where_its_capture_may_be_smaller():
    distance = A.minimum(A.maximum(A.sub(J, I), A.const(-9)), A.const(9))
    for place, size in ((I, 8 * 4096**2), (distance, gpu.PAIR_ELEMENTS)):
        bias = A.load(0, [H, place, J], "f")
        spec = AttentionSpec(score=A.add(SCORE, bias), captures=(Capture("f", 3, True),))
        found = next(c for c in candidates(ask(spec, T=4096, training=True)) if c.tier == "flash")
        assert found.predicted_bytes == 4 * (3 * 16 * 4096 + size)


def test_decode_bytes_are_those_that_the_launches_allocate():
    question = ask(T=1, S=8192, G=2, Dv=128)
    call = on_meta(question)
    out, logsumexp = call.outputs()
    found = [c for c in candidates(question) if c.tier == "decode"]
    assert len(found) > 1
    for c in found:
        tile = tiles.Tile(*c.tile, c.warps, c.stages)
        made = split.launches(call, out, logsumexp, tile, 132, 90, wanted=c.splits)
        assert made[0].grid[0] == c.splits
        assert allocated(made, out, call.query, call.key, call.value) == c.predicted_bytes


def test_float32_gets_the_tiles_of_its_own_table():
    for question, tier in ((ask(dtype="float32"), "flash"), (ask(dtype="float32", T=1, S=4096), "decode")):
        (found,) = [c for c in candidates(question) if c.tier == tier]
        assert found.tile is None and found.predicted_ms > 0


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_saved_bytes_are_those_that_autograd_holds(dropout):
    spec = replace(CAUSAL, dropout=dropout)
    q, k, v = (torch.randn(2, 8, 40, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        out = attention(q, k, v, spec, tier="chunked")
    known = {x.data_ptr() for x in (q, k, v, out)}
    saved = sum(x.nbytes for x in held if x.data_ptr() not in known)
    chosen = next(c for c in candidates(ask(spec, T=40, D=16, training=True)) if c.tier == "flash")
    assert saved == chosen.saved_bytes


# -- times --------------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("target", ["a100-80gb", "rtx4090", "h100-sxm", "b200"])
def test_more_work_is_never_faster(target, training):
    device = Target.by_name(target)

    def flash(**fields):
        return {k: v for k, v in times(ask(training=training, **fields), device).items() if k[0] in ("flash", "kept")}

    # lengths divisible by the tiles, because a tile that tests bounds takes longer
    for name, values in (("T", (128, 256, 512, 2048, 4096)), ("B", (1, 2, 3, 8, 50)), ("H", (1, 4, 16, 33))):
        row = [flash(**{name: n}) for n in values]
        for less, more in pairwise(row):
            assert all(more[k] >= less[k] * 0.999 for k in less), (name, less, more)
    full, causal, window = (flash(spec=s, T=4096) for s in (PLAIN, CAUSAL, WINDOW))
    assert all(window[k] <= causal[k] <= full[k] for k in full if k[0] == "flash")


@pytest.mark.parametrize("slower", ["clock", "bandwidth", "exponentials", "matrix"])
def test_a_faster_device_is_never_slower(slower):
    value = getattr(H100, slower)
    less = {k: v / 2 for k, v in value.items()} if slower == "matrix" else value / 2
    changes = {slower: less}
    if slower == "clock":  # rates depend on the clock
        changes |= {"matrix": {k: v / 2 for k, v in H100.matrix.items()}, "fp32": H100.fp32 / 2,
                    "exponentials": H100.exponentials / 2, "l2_bandwidth": H100.l2_bandwidth / 2}  # fmt: skip
    weak = replace(H100, **changes)
    for question in (ask(CAUSAL), ask(T=1, S=8192), ask(training=True)):
        fast, slow = times(question), times(question, weak)
        assert all(slow[k] >= fast[k] for k in fast if k in slow)
        assert any(slow[k] > fast[k] for k in fast if k in slow)


def test_a_program_s_own_operations_count():
    capped = AttentionSpec(score=A.mul(A.const(30.0), A.unary("tanh", A.mul(A.const(1 / 30), SCORE))))
    dropped = replace(PLAIN, dropout=0.1)
    plain, tanh, drop = (operations(s) for s in (PLAIN, capped, dropped))
    assert (plain.always, plain.special, plain.masked) == (0, 0, 0)
    assert tanh.special == 2 and tanh.always > 10 and drop.always > 15
    assert operations(CAUSAL).masked > 0 == operations(CAUSAL).always
    slow, fast, drawn = (next(t for k, t in times(ask(s)).items() if k[0] == "flash") for s in (capped, PLAIN, dropped))
    assert slow > fast < drawn


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("target", ["a100-80gb", "rtx4090", "h100-sxm", "b200"])
def test_a_summary_is_part_of_the_time_and_little_beside_the_kernels(monkeypatch, target, training):
    device = Target.by_name(target)

    def flash(**shape):
        return [c.predicted_ms for c in candidates(ask(tensor_mask(B, I, J), training=training, **shape), device)
                if c.tier == "flash"]  # fmt: skip

    shapes = dict(T=4096, H=16), dict(T=8192), dict(T=256)
    made = [flash(**shape) for shape in shapes]
    most = gpu.EMPTY
    monkeypatch.setattr(gpu, "EMPTY", -math.inf)
    without = [flash(**shape) for shape in shapes]
    for more, less, shape in zip(made, without, shapes):
        added = [x - y for x, y in zip(more, less)]
        if shape["T"] == 256:
            assert not any(added)
        else:  # two launches (the summary and the lists), and one read of the mask
            least = max(2 * device.launch / 1e3, 2 * shape["T"] ** 2 / device.bandwidth / 1e6)
            assert all(least < x <= most * min(less) for x in added)


ADDED = AttentionSpec(
    score=A.add(SCORE, A.load(0, (B, A.const(0), I, J), "f")), out_dtype="bfloat16", captures=(Capture("f", 4),)
)


@pytest.mark.parametrize(
    "spec, shape, training, pays",
    [
        (tensor_mask(B, J), dict(T=8192, B=1, H=1), False, True),
        (tensor_mask(B, J), dict(T=1024, B=1, H=1), False, False),  # its launches take too long
        (tensor_mask(B, I, J), dict(T=4096, B=1, H=16), False, True),
        (tensor_mask(B, I, J), dict(T=4096, B=1, H=1), False, False),  # as many elements as scores
        (tensor_mask(B, H, I, J), dict(T=4096), False, False),
        (ADDED, dict(T=4096, B=1, H=32), False, True),
        (ADDED, dict(T=4096, B=1, H=32), True, True),
        (ADDED, dict(T=256, B=1, H=32), False, False),
        (CAUSAL, dict(T=8192), False, False),
        (ALIBI, dict(T=8192), False, False),
    ],
)  # fmt: skip
def test_a_mask_is_summarized_where_that_takes_little_of_the_kernels_time(spec, shape, training, pays):
    question = ask(spec, **shape, D=128, training=training)
    found = gpu.summary(question, H100, "flash")
    assert (found is not None) == pays
    if pays:
        cost = gpu._Site(question, H100).summary_time(found, 3 if training else 1)
        flash = [c.predicted_ms for c in candidates(question) if c.tier == "flash"]
        assert 0 < cost <= gpu.EMPTY * (min(flash) - cost)


@pytest.mark.parametrize(
    "shape, pays",
    [
        (dict(S=131072, B=4, H=32, G=8), True),
        (dict(S=4096, B=1, H=32, G=8), False),  # a pass over so few keys takes no longer than two launches
    ],
)
def test_a_cache_with_a_mask_is_summarized_where_its_keys_take_long_to_read(shape, pays):
    spec = AttentionSpec(score=A.add(SCORE, A.load(0, (B, J), "f")), captures=(Capture("f", 2),))
    question = ask(spec, T=1, D=128, **shape)
    assert (gpu.summary(question, H100, "decode") is not None) == pays


def test_a_summary_by_head_serves_no_heads_that_share_keys():
    spec = AttentionSpec(score=A.add(SCORE, A.load(0, (H, J), "f")), captures=(Capture("f", 2),))
    for groups in (8, 32):
        question = ask(spec, T=1, D=128, S=262144, B=4, H=32, G=groups)
        assert (gpu.summary(question, H100, "decode") is not None) == (groups == 32)


def test_decoding_reads_the_keys_of_a_window_alone():
    seen = A.lt(A.sub(A.const(65535), J), A.const(4096))
    window = AttentionSpec(score=A.where(seen, SCORE, A.const(float("-inf"))), out_dtype="bfloat16")
    question = ask(window, T=1, S=65536, D=128, H=32, G=8, B=4)
    short = ask(T=1, S=4096, D=128, H=32, G=8, B=4)
    for x, y in zip(candidates(question), candidates(short)):
        if x.tier == "decode":
            assert x.splits == y.splits and x.predicted_ms == pytest.approx(y.predicted_ms, rel=0.1)


def test_with_dropout_the_kernels_choose_their_tile():
    (found,) = [c for c in candidates(ask(replace(PLAIN, dropout=0.1))) if c.tier == "flash"]
    assert found.tile is None and found.warps == 0


def test_streams_hide_each_other_s_units_but_never_the_busiest():
    step = Step(matrix=100, special=60, issue=40, shared=10)
    found = [cycles(step, n) for n in (1, 2, 4, 16, 1000)]
    assert found[0] == 210 and found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(100, rel=0.01)


def test_occupancy_is_bound_by_registers_shared_memory_and_warps():
    assert occupancy(H100, 8, 128, 0) == 2
    assert occupancy(H100, 4, 32, 100 << 10) == 2
    assert occupancy(H100, 16, 16, 0) == 4
    assert occupancy(H100, 8, 255, 300 << 10) == 0


def test_the_tiles_of_a_mask_are_counted():
    sizes = (("B", 1), ("H", 1), ("S", 1024), ("T", 1024))
    assert work(PLAIN, sizes, 128, 64).total == 8 * 16
    causal = work(CAUSAL, sizes, 128, 64)
    assert (causal.blocks, causal.shortest, causal.longest, causal.total) == (8, 2, 16, 72)
    assert causal.full == pytest.approx(1 - 16 / 72)


# -- the table ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sources():
    spec = importlib.util.spec_from_file_location("kernel_sources", ROOT / "benchmarks" / "kernel_sources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_of_the_kernels_as_they_are(sources):
    assert sources.recorded() == sources.fingerprint(), (
        "the flash kernels or their tiles have changed since their machine code was counted: "
        "run `python benchmarks/machine_code.py table` and commit attnfx/cost/instructions.json"
    )


def test_a_change_of_a_kernel_changes_the_fingerprint_and_a_comment_does_not(tmp_path, sources):
    for name in (*sources.SOURCES, sources.HELPERS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((sources.KERNELS / name).read_text())
    same = sources.fingerprint(tmp_path)
    forward = tmp_path / "triton" / "forward.py"
    forward.write_text("# a comment\n" + forward.read_text())
    assert same == sources.fingerprint(tmp_path) == sources.fingerprint()
    forward.write_text(forward.read_text().replace("l_i * alpha", "alpha * l_i"))
    assert same != sources.fingerprint(tmp_path)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_tile_that_the_kernels_take_by_themselves_comes_first_in_the_table(capability):
    for width in (64, 128, 256):
        for kernel, own in (
            ("forward", tiles.pick(tiles.FORWARD, capability, width)),
            ("keys", tiles.pick(tiles.BACKWARD, capability, width)[0]),
            ("rows", tiles.pick(tiles.BACKWARD, capability, width)[1]),
        ):
            found = instructions.codes(kernel, capability, width)
            assert found[0].tile == tuple(own)
            limit = (99 if capability in tiles.OF_SMALL else 163 if capability == 80 else 227) << 10
            assert all(code.shared <= limit and code.full.instructions > 0 for code in found)


# -- published numbers --------------------------------------------------------------------------
def published():
    """Yield the rows of the table of benchmarks/published.py with new predictions."""
    rows = json.loads((ROOT / "benchmarks/results/published.json").read_text())["rows"]
    for row in rows:
        target = Target.by_name(row["device"])
        kernel = other(row["kernel"], target, "bfloat16", row["width"])
        heads, batch, n = 2048 // row["width"], 16384 // row["length"], row["length"]
        part = work(CAUSAL if row["causal"] else PLAIN, (("B", batch), ("H", heads), ("S", n), ("T", n)),
                    kernel.rows, kernel.keys)  # fmt: skip
        ms = kernel.milliseconds(target, part, batch * heads, kernel.keys * 4 * row["width"]) + target.launch / 1e3
        if row["backward"]:
            ms = other_backward(row["kernel"], target, "bfloat16", row["width"], ms, 16384 * 2048, 2)
        flops = (10 if row["backward"] else 4) * batch * heads * n**2 * row["width"]
        yield row, flops * (0.5 if row["causal"] else 1) / ms / 1e9


def test_published_kernels_are_predicted_within_their_error_and_in_order():
    found = list(published())
    for row, predicted in found:
        assert predicted == pytest.approx(row["predicted"], rel=0.01), "run `python benchmarks/published.py`"
        if row["held"]:
            assert predicted == pytest.approx(row["published"], rel=0.16), row
        if row["length"] == 16384 and row["width"] <= 128:
            assert predicted == pytest.approx(row["published"], rel=0.15), row
        assert re.search(r"\d{4}|pull request|upstream", row["source"])
    long = [(r, p) for r, p in found if r["length"] == 16384 and r["width"] <= 128]
    for a, p in long:
        for b, q in long:
            alike = all(a[k] == b[k] for k in ("device", "width", "causal", "backward")) and a["kernel"] != b["kernel"]
            if alike and a["published"] > 1.05 * b["published"]:
                assert p > q, (a, b)


# -- programs with their own tiles ----------------------------------------------------------------
BIAS = AttentionSpec(
    score=A.add(SCORE, A.load(0, [H, I, J], "f")), out_dtype="bfloat16", captures=(Capture("f", 3, True),)
)


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("spec", [PLAIN, replace(PLAIN, dropout=0.1), BIAS], ids=["plain", "dropout", "bias"])
def test_the_table_has_the_kernels_own_tiles(spec, width, capability):
    kind = " dropout" if spec.random else " loads" if spec.captures else ""
    keys, rows = tiles.pick(tiles.backward_table(spec), capability, width)
    wanted = {"forward": tiles.pick(tiles.forward_table(spec), capability, width), "keys": keys, "rows": rows}
    assert {k: instructions.codes(k + kind, capability, width)[0].tile for k in wanted} == wanted


def test_dropout_costs_the_instructions_of_its_draw():
    for width in (64, 128):
        plain, drawn = (instructions.codes(k, 90, width)[0] for k in ("forward", "forward dropout"))
        per_score = [c.full.instructions / c.scores for c in (plain, drawn)]
        assert per_score[1] > 1.3 * per_score[0]
    alone, dropped = (times(ask(replace(PLAIN, dropout=p), training=True))["flash", t, 0]
                      for p, t in ((0.0, (128, 64)), (0.1, None)))  # fmt: skip
    assert 1.1 * alone < dropped < 4 * alone


def test_a_program_with_loads_is_given_no_tile_that_holds_more_than_its_own():
    a100 = Target.by_name("a100-80gb")
    some = [c.tile for c in candidates(ask(BIAS, D=128), a100) if c.tier == "flash"]
    assert some == [(128, 32)]
    assert [c.tile for c in candidates(ask(BIAS, D=64), a100) if c.tier == "flash"] == [(128, 64), (64, 64), (128, 32)]
