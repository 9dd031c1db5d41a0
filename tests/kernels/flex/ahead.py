"""Compile the calls of flex_attention for a GPU that is not present, and print a JSON list of facts about each kernel.

A PyTorch without CUDA traces a graph for a GPU on fake tensors, but Inductor asks the device for its properties, and
AOTAutograd copies on it. So the call is cut out of the rewritten graph, its functions are decomposed on the CPU, and
Inductor lowers it to Triton with an assumed device. It is assumed in this process alone, which runs none of the code.
The backward pass is beyond reach: only AOTAutograd makes its operator.
"""

import importlib.util
import json
import math
import operator
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.utils._triton
import triton
from torch import fx
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnfx import Options
from attnfx.compiler import pipeline

OPERATOR = torch.ops.higher_order.flex_attention
SHARED = {80: 166912, 90: 232448}  # bytes of a program: CUDA programming guide


# -- programs. Without CUDA, PyTorch can neither index nor invert a fake tensor on a GPU by Python's operators ----
def below(q, k):
    i, j = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
    return i.unsqueeze(1) >= j


def capped(q, k, v):
    return (20 * torch.tanh(q @ k.mT * 0.01)).masked_fill(below(q, k).logical_not(), -math.inf).softmax(-1) @ v


def alibi(q, k, v, slopes):
    i, j = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
    scores = q @ k.mT * 0.1 + slopes.view(-1, 1, 1) * (j - i.unsqueeze(1))
    return scores.masked_fill(below(q, k).logical_not(), -math.inf).softmax(-1).to(v.dtype) @ v


def documents(q, k, v, doc):
    same = doc.unsqueeze(1).unsqueeze(3) == doc.unsqueeze(1).unsqueeze(1)
    return (q @ k.mT * 0.1).masked_fill((same & below(q, k)).logical_not(), -math.inf).softmax(-1) @ v


def dense(q, k, v, keep):
    return (q @ k.mT * 0.1).masked_fill(keep.logical_not(), torch.finfo(q.dtype).min).softmax(-1) @ v


def unmasked(q, k, v):
    return torch.tanh(q @ k.mT * 0.01).softmax(-1) @ v


def grouped(q, k, v):
    return capped(q, *(x.repeat_interleave(4, 1) for x in (k, v)))


def programs():
    def heads(t=1024, h=8, dtype=torch.bfloat16):
        return torch.empty(2, h, t, 64, dtype=dtype, device="cuda")

    x = heads()
    yield "unmasked", unmasked, (x, x, x)
    yield "capped", capped, (x, x, x)
    yield "alibi", alibi, (x, x, x, torch.empty(8, dtype=x.dtype, device="cuda"))
    yield "documents", documents, (x, x, x, torch.empty(2, 1024, dtype=torch.int64, device="cuda"))
    yield "dense", dense, (x, x, x, torch.empty(1024, 1024, dtype=torch.bool, device="cuda"))
    yield "ragged", capped, (heads(1000),) * 3
    yield "grouped", grouped, (x, heads(h=2), heads(h=2))
    yield "decode", capped, (heads(1), x, x)


# -- the rewritten graph --------------------------------------------------------------------------------------
def call_of(fn, given):
    """Return the call of the operator alone, as a graph of ATen operators."""
    options = Options.make({"target": "h100-sxm", "tiers": ("flex",), "rewrite": "always"})
    made = []

    def backend(gm, _):
        made.append(pipeline.run(gm, options).gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend)(*given)
    (gm,) = made
    (call,) = gm.graph.find_nodes(op="call_function", target=OPERATOR)
    graph, copies, root = fx.Graph(), {}, torch.nn.Module()
    for n in sorted(call.all_input_nodes, key=lambda n: "val" not in n.meta):
        copies[n] = graph.placeholder(n.name) if "val" in n.meta else graph.get_attr(n.target)
        copies[n].meta = dict(n.meta)
        if "val" not in n.meta:
            root.add_module(n.target, decomposed(getattr(gm, n.target)))
    outs = []
    made = graph.node_copy(call, copies.__getitem__)
    for n in range(2):
        outs.append(graph.call_function(operator.getitem, (made, n)))
        outs[-1].meta["val"] = call.meta["val"][n]
    graph.output(tuple(outs))
    return fx.GraphModule(root, graph)


def decomposed(function):
    """Return a function of one element in the operators that Inductor lowers, as AOTAutograd makes it."""
    kinds = [n.meta["val"] for n in function.graph.find_nodes(op="placeholder")]
    like = [torch.zeros(x.shape, dtype=x.dtype) for x in kinds]
    with torch.no_grad(), TransformGetItemToIndex():
        made = make_fx(function, decomposition_table=select_decomp_table())(*like)
    for n in made.graph.nodes:
        if n.kwargs.get("device") is not None:
            n.kwargs = {**n.kwargs, "device": kinds[0].device}
    made.recompile()
    return made


# -- code for a device that is not present ----------------------------------------------------------------------
def assume(capability):
    """Answer for a device of this compute capability wherever Inductor asks."""
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name="assumed", major=major, minor=minor, multi_processor_count=108, warp_size=32, total_memory=80 << 30,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
        shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED[capability], L2_cache_size=40 << 20,
        gcnArchName="",
    )  # fmt: skip
    answers = dict(
        is_available=True, device_count=1, current_device=0, get_device_properties=properties,
        get_device_capability=(major, minor), get_compute_capability=capability,
    )  # fmt: skip
    for name, answer in answers.items():
        asked = staticmethod(lambda *_, answer=answer: answer)
        setattr(CudaInterface, name, asked)
        setattr(torch.cuda, name, asked.__func__)
        setattr(CudaInterface.Worker, name, asked)
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def lowered(gm):
    """Return Inductor's code for a graph."""
    given = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    mode = given[0].fake_mode
    graph = GraphLowering(gm, example_inputs=given, shape_env=mode.shape_env, is_inference=True)
    context = DebugContext(), V.set_graph_handler(graph), V.set_fake_mode(mode), config.patch(compile_threads=1)
    with context[0], context[1], context[2], context[3], tracing(TracingContext(mode)), torch.no_grad():
        graph.run(*given)
        code = graph.codegen()[0]
    return getattr(code, "value", code)


def sources(gm):
    """Return Inductor's Triton code for a graph, by kernel."""
    code = lowered(gm)
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL))


def on_flash(gm):
    """Return what FlashAttention-4 is given: Inductor's code in CuTe, which only the package itself can compile."""
    from torch._inductor.kernel.flex import flex_flash_attention as library

    library.ensure_flash_available = lambda: True
    (call,) = gm.graph.find_nodes(op="call_function", target=OPERATOR)
    call.args = (*call.args[:6], {**call.args[6], "BACKEND": "FLASH"}, *call.args[7:])
    gm.recompile()
    code = lowered(gm)
    given = ("_flash_attn_fwd(", "def score_mod(", "def mask_mod(", "block_size=(128, 128)")
    return [text for text in given if text in code]


def compiled(name, source, capability, folder):
    """Compile one kernel for a compute capability. Inductor's decorator would launch it, so it is left out."""
    meta = {}

    def decorator(**stated):
        meta.update(stated)
        return lambda function: function

    file = Path(folder) / f"{name}.py"
    file.write_text(re.sub(r"@triton_heuristics\.\w+\(", "@DECORATOR(", source))
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    module.DECORATOR = decorator
    spec.loader.exec_module(module)
    stated = meta["triton_meta"]
    known = stated["configs"][0]
    code = ASTSource(getattr(module, name), stated["signature"], constexprs=stated["constants"], attrs=dict(known))
    options = {n: meta[n] for n in ("num_warps", "num_stages") if n in meta}
    return triton.compile(code, target=GPUTarget("cuda", capability, 32), options=options)


def main():
    capability = int(sys.argv[1])
    with FakeTensorMode(), torch.no_grad():
        calls = {name: call_of(fn, given) for name, fn, given in programs()}
    assume(capability)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, call in calls.items():
            for kernel, source in sources(call).items():
                if not re.search(r"tl\.dot\(", source):
                    continue  # a loop over elements beside the operator's kernel
                made = compiled(kernel, source, capability, folder)
                matrix = [op for op in ("wgmma.mma_async", "mma.sync") if op in made.asm["ptx"]]
                found.append(dict(name=name, kernel=kernel, matrix=matrix, shared=made.metadata.shared))
    flash = {name: on_flash(call) for name, call in calls.items()} if capability == 90 else {}
    print(json.dumps([found, flash]))


main()
