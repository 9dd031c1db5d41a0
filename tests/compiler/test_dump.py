"""Write each graph's stages, the report, the specs and the generated code into `dump_dir`."""

import torch

from attnfx.compiler import dump as dumping
from attnfx.compiler.pipeline import Result
from attnfx.ir import algebra as A
from attnfx.options import Options
from attnfx.report.records import Decision, Site
from attnfx.report.report import Report
from attnfx.spec import AttentionSpec, I, J
from tests.support import compiled, qkv


def attend(q, k, v):
    return ((q @ k.mT) * 0.25).softmax(-1) @ v


def test_every_stage_of_every_graph_is_written(tmp_path):
    for _ in range(2):
        torch._dynamo.reset()
        compiled(attend, dump_dir=str(tmp_path))(*qkv())
    first, second = sorted(tmp_path.iterdir())
    for folder in (first, second):
        names = [f.name for f in sorted(folder.iterdir())]
        assert names == [
            "0_dynamo.py", "1_traced.dot", "1_traced.graphml", "1_traced.py", "1_traced.txt",
            "2_lifted.dot", "2_lifted.graphml", "2_lifted.txt",
            "3_rewritten.dot", "3_rewritten.graphml", "3_rewritten.py", "3_rewritten.txt",
            "attention_0.json", "attention_0.txt", "passes", "report.json", "report.txt",
        ]  # fmt: skip
    assert "aten.softmax" in (first / "1_traced.py").read_text()
    assert "attnfx.attention" in (first / "3_rewritten.py").read_text()
    assert "score   0.25 * dot" in (first / "attention_0.txt").read_text()
    assert AttentionSpec(score=A.mul(A.const(0.25), A.DOT)).to_json() == (first / "attention_0.json").read_text()


def test_the_generated_functions_of_a_triton_kernel_are_written(tmp_path):
    spec = AttentionSpec(score=A.where(A.ge(I, J), A.mul(A.const(0.25), A.DOT), A.const(float("-inf"))))
    sites = [
        Site(f"attention_{n}", spec=spec, decision=Decision(tier, ""))
        for n, tier in enumerate(("flash", "decode", "chunked"))
    ]
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    folder = dumping.dump(gm, Result(None, Report(sites)), Options(dump_dir=tmp_path))
    text = (folder / "attention_0.triton.py").read_text()
    assert "@triton.jit\ndef keep(" in text and "@triton.jit\ndef score(" in text
    assert text == (folder / "attention_1.triton.py").read_text()
    assert not (folder / "attention_2.triton.py").exists()
