"""Define the operators `attnfx::attention` and `attnfx::attention_backward`, which rewritten graphs call.

`attnfx::attention_weights` and its backward operator are in `kernels/operators/weights.py`.

A spec is passed as its JSON text, so a graph that contains the operator can be cached. The backward pass is a separate
operator, so that AOTAutograd can trace it. The tier's name selects the implementation when the operator is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnfx.kernels.call import Call
from attnfx.kernels.chunked import attention as chunked
from attnfx.kernels.chunked.block_run import Run
from attnfx.kernels.flash import tier as flash
from attnfx.kernels.library import cpu as library
from attnfx.kernels.library import cuda as fused
from attnfx.kernels.operators.configuration import parse
from attnfx.mask import runtime_summary as mask_summary
from attnfx.spec import AXES, AttentionSpec, from_json

_SHARED = "Tensor[] captures, SymInt[] sizes, Tensor? seed, str spec, str tier, Tensor? summary=None"
_FORWARD = f"attention(Tensor query, Tensor key, Tensor value, {_SHARED}) -> (Tensor, Tensor)"
_BACKWARD = (
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    f"{_SHARED}, Tensor? grad_logsumexp=None) -> (Tensor, Tensor, Tensor, Tensor[])"
)


class Tier(NamedTuple):
    """One implementation of the operator.

    expresses(spec, dtype, device, head_dim, value_width, capability) returns None, or the reason why this tier cannot
    run such calls. `capability` is the device's compute capability; None queries the device.
    supports(call) returns the same for one call.
    forward(call) returns (out, logsumexp) as the operator does. It also takes `tile` and `splits` if a configuration
    sets them.
    backward(call, grad_out, out, logsumexp, grad_logsumexp) returns the gradients of query, key and value, and of the
    captures that have one. `grad_logsumexp` is None if the logsumexp is unused.
    The chunked tier's passes also take `make`, which creates the call's run, if a configuration sets `elements`.
    """

    expresses: Callable[[AttentionSpec, torch.dtype, torch.device, int, int, int | None], str | None]
    supports: Callable[[Call], str | None]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]


_ELSEWHERE = "only the rewritten graph calls flex_attention"
TIERS: dict[str, Tier] = {
    "library": Tier(lambda *of: library.expresses(*of[:5]), library.supports, library.forward, library.backward),
    "decode": Tier(flash.expresses, flash.supports_decode, flash.forward_decode, flash.backward),
    "flash": Tier(flash.expresses, flash.supports, flash.forward, flash.backward),
    # a graph calls PyTorch's flex_attention itself: here it only names a decision for another device
    "flex": Tier(lambda *_: _ELSEWHERE, lambda _: _ELSEWHERE, chunked.forward, chunked.backward),
    "chunked": Tier(lambda *_: None, lambda _: None, chunked.forward, chunked.backward),
}
AUTO = {"cpu": ("library", "chunked"), "cuda": ("decode", "flash", "chunked")}  # by device, in order of preference


def choose(tiers: str, call: Call) -> Tier:
    """Return the first tier of a comma-separated list that supports the call; "auto" lists the tiers of its device.

    Raise ValueError if none does.
    """
    reasons = []
    if tiers == "auto":
        tiers = ",".join(AUTO.get(call.query.device.type, ("chunked",)))
    for name, tile, splits, elements in parse(tiers):
        if name not in TIERS:
            raise ValueError(f"attnfx.attention: unknown tier {name!r}; valid tiers: {', '.join(['auto', *TIERS])}")
        tier = TIERS[name]
        why = tier.supports(call)
        if why is None and elements:
            make = partial(Run, elements=elements)
            return tier._replace(forward=partial(tier.forward, make=make), backward=partial(tier.backward, make=make))
        if why is None:
            return tier if tile is None else tier._replace(forward=partial(tier.forward, tile=tile, splits=splits))
        reasons.append(f"the {name} tier cannot run this call: {why}")
    raise ValueError(f"attnfx.attention: {'; '.join(reasons)}")


def refusals(
    spec: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    value_width: int,
    capability: int | None = None,
) -> dict[str, str]:
    """Return the reason for each tier that cannot run a spec with these widths, at any other sizes. With `capability`,
    answer for a device of that compute capability, which need not be present. On a GPU, the library tier is a call of
    PyTorch's operator in the graph itself."""
    reasons = {}
    for name, tier in TIERS.items():
        if name == "library" and device.type == "cuda":
            reasons[name] = fused.expresses(spec, dtype, device, head_dim, value_width, capability)
        elif name in AUTO.get(device.type, ("chunked",)):
            reasons[name] = tier.expresses(spec, dtype, device, head_dim, value_width, capability)
        else:
            reasons[name] = f"this tier does not run on {device.type}"
    return {name: why for name, why in reasons.items() if why is not None}


# -- checks -------------------------------------------------------------------------------------
def require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(f"attnfx.attention: {message}")


def check(call: Call) -> None:
    for problem in _problems(call):
        require(False, problem)


def _problems(call: Call) -> Iterator[str]:
    """Yield the problems of a call as texts, made only for a wrong call: decoding checks thousands of calls."""
    spec, query, key, value, captures, sizes, seed, summary = (getattr(call, f.name) for f in fields(call))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            yield f"{name} has {x.ndim} dims, expected 4"
        if x.dtype not in _FLOATS:
            yield f"{name} is {x.dtype}, expected a floating type"
        if x.dtype != query.dtype:
            yield f"{name} is {x.dtype}, but query is {query.dtype}"
        if x.device != query.device:
            yield f"{name} is on {x.device}, but query is on {query.device}"
    if key.shape[0] != query.shape[0]:
        yield f"key has batch {key.shape[0]}, but query has {query.shape[0]}"
    if key.shape[3] != query.shape[3]:
        yield f"key has head_dim {key.shape[3]}, but query has {query.shape[3]}"
    if value.shape[:3] != key.shape[:3]:
        shapes = tuple(value.shape[:3]), tuple(key.shape[:3])
        yield f"value has batch, heads and length {shapes[0]}, but key has {shapes[1]}"
    heads, groups = query.shape[1], key.shape[1]
    if not (heads == groups == 0 or (groups > 0 and heads % groups == 0)):
        yield f"query has {heads} heads, not a multiple of key's {groups}"
    if len(captures) != len(spec.captures):
        yield f"captures has {len(captures)} tensors, expected {len(spec.captures)}"
    for n, (x, c) in enumerate(zip(captures, spec.captures)):
        if x.ndim != c.ndim:
            yield f"captures[{n}] has {x.ndim} dims, expected {c.ndim}"
        if x.device != query.device:
            yield f"captures[{n}] is on {x.device}, but query is on {query.device}"
        if c.grad and x.dtype not in _FLOATS:
            yield f"captures[{n}] is {x.dtype}, but only a floating type can have a gradient"
    if len(sizes) != len(spec.sizes):
        yield f"sizes has {len(sizes)} numbers, expected {len(spec.sizes)}"
    if spec.random and seed is None:
        yield "seed is None, but the spec has dropout"
    elif spec.random and (seed.dtype != torch.int64 or seed.numel() != 1):
        yield f"seed is {seed.dtype} with {seed.numel()} elements, expected int64 with one element"
    if summary is not None:
        found = mask_summary.of(spec)
        if found is None:
            yield "summary is given, but the spec has no mask in a captured tensor"
        want = mask_summary.shape(found.spec, call.sizes)  # type: ignore[union-attr]
        if summary.dtype != torch.uint8:
            yield f"summary is {summary.dtype}, expected torch.uint8"
        if summary.device != query.device:
            yield f"summary is on {summary.device}, but query is on {query.device}"
        if tuple(summary.shape) != want:
            yield f"summary has shape {tuple(summary.shape)}, expected {want}"


_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


# -- implementations ----------------------------------------------------------------------------
def checked(query, key, value, captures, sizes, seed, spec, summary=None) -> Call:
    call = Call(from_json(spec), query, key, value, captures, sizes, seed, summary)
    check(call)
    return call


def _attention(query, key, value, captures, sizes, seed, spec, tier, summary=None):
    call = checked(query, key, value, captures, sizes, seed, spec, summary)
    return choose(tier, call).forward(call)


def _attention_backward(
    grad_out, query, key, value, out, logsumexp, captures, sizes, seed, spec, tier, summary=None, grad_logsumexp=None
):
    call = checked(query, key, value, captures, sizes, seed, spec, summary)
    require(grad_out.shape == out.shape, f"grad_out has shape {tuple(grad_out.shape)}, but out has {tuple(out.shape)}")
    if grad_logsumexp is not None:
        require(call.spec.normaliser == "softmax", "grad_logsumexp is given, but the spec has no softmax")
        have, want = tuple(grad_logsumexp.shape), tuple(logsumexp.shape)
        require(have == want, f"grad_logsumexp has shape {have}, but logsumexp has {want}")
    return choose(tier, call).backward(call, grad_out, out, logsumexp, grad_logsumexp)


def _fake_attention(query, key, value, captures, sizes, seed, spec, tier, summary=None):
    return checked(query, key, value, captures, sizes, seed, spec, summary).outputs()


def _fake_attention_backward(grad_out, query, key, value, out, logsumexp, captures, sizes, seed, spec, *_):
    wanted = [x for x, c in zip(captures, from_json(spec).captures) if c.grad]
    empty = [x.new_empty(x.shape) for x in (query, key, value, *wanted)]
    return (*empty[:3], empty[3:])


# -- autograd -----------------------------------------------------------------------------------
def _setup(ctx, inputs, output):
    query, key, value, captures, sizes, seed, spec, tier, summary = inputs
    out, logsumexp = output
    ctx.save_for_backward(query, key, value, out, logsumexp, seed, summary, *captures)
    ctx.sizes, ctx.spec, ctx.tier = sizes, spec, tier
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_logsumexp):
    query, key, value, out, logsumexp, seed, summary, *captures = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, found = torch.ops.attnfx.attention_backward(
        grad_out, query, key, value, out, logsumexp, captures, ctx.sizes, seed, ctx.spec, ctx.tier, summary,
        grad_logsumexp,
    )  # fmt: skip
    given = iter(found)
    of_captures = [next(given) if c.grad else None for c in from_json(ctx.spec).captures]
    # register_autograd treats an empty list as a list of tensors, and any other list of integers as one leaf
    of_rest = [None] * (3 if summary is None else 4)  # the dispatcher drops arguments that have their default value
    return (*grads, of_captures, [] if not ctx.sizes else None, *of_rest)


def twice(ctx, *grads):
    raise RuntimeError(
        "attnfx.attention cannot be differentiated twice: its backward pass has no derivative; call the model without "
        "torch.compile for that"
    )


# -- autocast -----------------------------------------------------------------------------------
def _autocast(device: str, key_name: str, operator, tensors: int):
    """Wrap the operator so that autocast casts its first `tensors` operands, as it does for a matrix product."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key_name))

    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            if all(x.dtype == torch.float32 for x in args[:tensors]):
                to = torch.get_autocast_dtype(device)
                args = (*(x.to(to) for x in args[:tensors]), *args[tensors:])
            return operator(*args)

    return run


# -- operations ---------------------------------------------------------------------------------
def _flops(query: int, by_head_dim: int, by_value_width: int) -> Callable[..., int]:
    """Return a formula that counts the FLOPs of contractions over D and over Dv, masked keys included. `query` is the
    position of the query's shape; key and value follow it. One contraction takes 2 * B * H * T * S * D."""

    def formula(*shapes, out_shape=None, **_) -> int:
        (b, h, t, d), (_, _, s, _), third = shapes[query : query + 3]
        return 2 * b * h * t * s * (by_head_dim * d + by_value_width * third[-1])

    return formula


_library = torch.library.Library("attnfx", "DEF")


def register(
    schema: str,
    real,
    fake,
    derivative,
    setup=None,
    autocast: int = 0,
    capturable: bool = True,
    flops: tuple[int, int, int] | None = None,
) -> None:
    """Define an operator of the `attnfx` namespace. Autocast casts its first `autocast` operands, as it does for a
    matrix product. An operator that is not `capturable` synchronizes with the device, so Inductor leaves it out of CUDA
    graphs. `flops` are the arguments of `_flops`."""
    name = schema[: schema.index("(")]
    tags = (torch.Tag.pt2_compliant_tag,) if capturable else (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    _library.define(schema, tags=tags)
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnfx::{name}", fake, lib=_library)
    torch.library.register_autograd(f"attnfx::{name}", derivative, setup_context=setup, lib=_library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.attnfx, name))(_flops(*flops))
    for device in ("cpu", "cuda") if autocast else ():
        key_name = f"Autocast{device.upper()}"
        call = getattr(torch.ops.attnfx, name)
        _library.impl(name, _autocast(device, key_name, call, autocast), key_name)


register(_FORWARD, _attention, _fake_attention, _differentiate, _setup, autocast=3, flops=(0, 1, 1))
# one more contraction recomputes the scores
register(_BACKWARD, _attention_backward, _fake_attention_backward, twice, flops=(1, 3, 2))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec | str,
    captures: Sequence[Tensor] = (),
    *,
    sizes: Sequence[int] = (),
    seed: Tensor | None = None,
    tier: str = "auto",
) -> Tensor:
    """Compute the attention that a spec describes, on any device.

    It is differentiable once, in query, key, value and the captures with `grad`. Autocast treats it as a matrix
    product: it casts query, key and value if all three are float32.

    Args:
        query: (B, H, T, D), of dtype float16, bfloat16, float32 or float64.
        key: (B, G, S, D), with the dtype and device of `query`; G divides H.
        value: (B, G, S, Dv), with the dtype and device of `query`.
        spec: The spec (`AttentionSpec` has the formula), or its JSON text.
        captures: One tensor for each entry of `spec.captures`, of its kind and number of dims, on the device of
            `query`. It must contain every index that the programs load: shapes are not checked.
        sizes: One integer for each name in `spec.sizes`.
        seed: An int64 tensor with one element, which seeds the dropout; by default PyTorch's generator samples it.
        tier: The tiers to try, in order, separated by commas: "library" (on a CPU), "flash" and "decode" (on a GPU),
            "chunked". "auto" tries all that the device has.

    Returns:
        (B, H, T, Dv), of dtype `spec.out_dtype`.

    Raises:
        ValueError: An operand does not fit the spec, the JSON text has another version, or no tier can run the call.
        RuntimeError: A second derivative is computed.
    """
    made = from_json(spec) if isinstance(spec, str) else spec
    compiling = torch.compiler.is_compiling()
    text = spec if isinstance(spec, str) else made.to_json() if compiling else _text(made)
    if made.random and seed is None:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=query.device)
    summary = None
    if not compiling:
        summary = _summary(Call(made, query, key, value, captures, sizes, seed), tier)
    return torch.ops.attnfx.attention(query, key, value, list(captures), list(sizes), seed, text, tier, summary)[0]


def _summary(call: Call, tier: str) -> Tensor | None:
    """Summarize the mask for this call alone, if the flash tier may run the call and the summary pays off."""
    names = AUTO.get(call.query.device.type, ()) if tier == "auto" else tier.split(",")
    if all(name.partition(":")[0] != "flash" for name in names):  # a name may be followed by a configuration
        return None
    check(call)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))
    found = mask_summary.worth(call.spec, call.sizes, passes=3 if training else 1)
    if found is None or flash.supports(call) is not None:
        return None
    sizes = [call.sizes[n] for n in (*AXES.values(), *found.names)]
    return flash.summarise([call.captures[s] for s in found.slots], sizes, found.spec)


# Dynamo calls this method during tracing. Such a function cannot take a spec as an argument, but as its `self`.
torch.compiler.assume_constant_result(AttentionSpec.to_json)


@lru_cache(maxsize=1024)
def _text(spec: AttentionSpec) -> str:
    return spec.to_json()
