"""Leave PyTorch's functions, patterns and configuration as they were."""

import subprocess
import sys

SNAPSHOT = """
import torch, torch._inductor.config, torch._dynamo.config, torch._functorch.config
import torch._inductor.compile_fx, torch._inductor.fx_passes.fuse_attention, torch.nn.functional as F
from torch._inductor.fx_passes import joint_graph, post_grad, pre_grad
def state():
    out = {}
    for m in (torch._inductor.config, torch._dynamo.config, torch._functorch.config):
        out[m.__name__] = m.save_config_portable()
    patterns = torch._inductor.fx_passes.fuse_attention
    for m in (torch, F, torch.Tensor, torch._inductor.compile_fx, patterns, joint_graph, torch.fx.Graph):
        out[repr(m)] = {k: id(v) for k, v in vars(m).items() if callable(v) and not k.startswith("__")}
    out["default dtype"] = torch.get_default_dtype()
    out["deterministic"] = torch.are_deterministic_algorithms_enabled()
    out["grad"] = torch.is_grad_enabled()
    out["threads"] = torch.get_num_threads()
    return out
def fn(q, k, v):
    return ((q @ k.mT) * 0.3).softmax(-1) @ v
args = [torch.randn(1, 2, 8, 4) for _ in range(3)]
torch.compile(fn, backend="aot_eager")(*args)
before = state()
import attnfx, attnfx.backend, attnfx.kernels.operators.attention
torch._dynamo.reset()
torch.compile(fn, backend="attnfx", options={"rewrite": "always", "inner": "aot_eager"})(*args)
after = state()
import attnfx.report.report
assert attnfx.report.report.reports()[-1].rewritten
for name in before:
    assert before[name] == after[name], (name, [k for k in before[name] if before[name][k] != after[name].get(k)])
"""


def test_neither_import_nor_compilation_changes_pytorch_or_its_configuration():
    done = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
