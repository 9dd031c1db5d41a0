"""Compile a graph with Inductor, or with AOTAutograd alone. Independent of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from attnfx.options import Options

Failed = Callable[[Exception], None]


class Partitioner(CustomPartitionerFn):
    """A function as Inductor's custom partitioner, with a cache key."""

    def __init__(self, function: Callable[..., tuple[GraphModule, GraphModule]], key: object):
        self.function, self.key = function, key

    def __call__(self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any):
        return self.function(gm, joint_inputs, **kwargs)

    def uuid(self) -> object:
        return self.key


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None = None,
    *,
    capturable: bool = True,
    partitioner: Partitioner | None = None,
    patches: Mapping[str, Any] | None = None,
    backward_failed: Failed | None = None,
) -> Callable[..., Any]:
    """Compile a graph with the compiler that `options.inner` names. The compiler's errors propagate.

    capturable       False if the graph must not be captured as a CUDA graph
    partitioner      selects the values that are saved for the backward pass
    patches          Inductor configuration during this compilation
    backward_failed  called if Inductor cannot compile a backward graph, which then runs operator by operator
    """
    if options.inner == "eager":
        return gm.forward
    from torch._inductor import list_mode_options

    asked = list_mode_options(mode) if mode and mode != "default" else {}
    if not capturable:
        asked = {**asked, "triton.cudagraphs": False}
    contained = backward_failed is not None and options.inner == "inductor" and not _replaced()
    compiler = _forgiving(backward_failed) if contained else None  # type: ignore[arg-type]
    return compile_rest(gm, list(example_inputs), options.inner, {**asked, **(patches or {})}, partitioner, compiler)


def compile_rest(gm: GraphModule, example_inputs: list[Any], inner: str, patches: Mapping[str, Any] | None = None,
                 partitioner: Partitioner | None = None, compiler: Any = None) -> Any:  # fmt: skip
    """Compile with Inductor, or AOTAutograd alone, with an optional partitioner and inner compiler."""
    if inner == "aot_eager":
        from torch._dynamo.backends.common import aot_autograd
        from torch._dynamo.backends.debugging import boxed_nop
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        return aot_autograd(
            fw_compiler=compiler or boxed_nop, partition_fn=partitioner or min_cut_rematerialization_partition,
            keep_inference_input_mutations=True,
        )(gm, example_inputs)  # fmt: skip
    import torch._inductor.compile_fx as inductor

    more: dict[str, Any] = {} if compiler is None else {"inner_compile": compiler}
    patches = dict(patches or {}) | ({} if partitioner is None else {"custom_partitioner_fn": partitioner})
    return inductor.compile_fx(gm, example_inputs, config_patches=patches or None, **more)


def _replaced() -> bool:
    """Return whether a tool stands in for `compile_fx`, for example to look at the graphs that Inductor receives. Such
    a tool brings an inner compiler of its own, which an argument would override."""
    import torch._inductor.compile_fx as inductor

    code = getattr(inductor.compile_fx, "__code__", None)
    return code is None or code.co_filename != inductor.__file__


def _forgiving(failed: Failed) -> Callable[..., Any]:
    """Wrap Inductor's inner compiler: a backward graph that it cannot compile runs operator by operator."""
    import torch._inductor.compile_fx as inductor
    from torch._dynamo.backends.debugging import boxed_nop

    def compile_inner(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        try:
            return inductor.compile_fx_inner(gm, example_inputs, **kwargs)  # type: ignore[arg-type]
        except Exception as problem:
            if not kwargs.get("is_backward") or any(map(_draws_by_itself, gm.graph.nodes)):
                raise
            failed(problem)
            return boxed_nop(gm, list(example_inputs))

    return compile_inner


def _draws_by_itself(n: torch.fx.Node) -> bool:
    """Check for Inductor's own random operators: run in eager, they would draw other numbers than generated code."""
    return "inductor_random" in str(n.target) or "inductor_randint" in str(n.target)


def compiled(function: Callable[..., Sequence[Tensor]], operands: Sequence[Tensor], grad: bool) -> Callable[..., Any]:
    """Compile `function` for the sizes, strides and dtypes of `operands`, which are fake tensors.

    It is traced once, with autograd enabled if `grad`, and dead code is eliminated. The result is not differentiable
    and never uses CUDA graphs.
    """
    import torch._inductor.compile_fx as inductor

    with torch.set_grad_enabled(grad):
        gm = make_fx(function, tracing_mode="fake")(*operands)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    if not gm.graph.output_node().args[0]:
        return lambda *_: ()
    with torch.no_grad():
        return inductor.compile_fx(gm, list(operands), config_patches={"triton.cudagraphs": False})  # type: ignore[return-value]
