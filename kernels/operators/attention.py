"""The operators `attnfx::attention` and `attnfx::attention_backward`: what a rewritten graph calls.

`attnfx::attention_weights`, with a backward operator of its own, stands in `kernels/operators/weights.py`.

A spec travels as its JSON text, so a graph that holds the operator can be cached. The backward pass is an operator of
its own, so that AOTAutograd can trace it. Which code runs is decided by the tier's name when the operator is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """One way to run a call.

    expresses(spec, dtype, device, head_dim, value_width, capability) is None, or says in words why this way runs no
    such call; `capability` is that of the device, None to ask it.
    supports(call) is the same for one call.
    forward(call) -> (out, logsumexp), as the operator gives them; `tile` and `splits` where a configuration names them.
    backward(call, grad_out, out, logsumexp, grad_logsumexp) -> gradients of query, key, value, and of the captures that
    have one; `grad_logsumexp` is None where nothing is made of the logsumexp.
    The chunked tier's take `make`, the run of a call, where a configuration names its `elements`.
    """

    expresses: Callable[[AttentionSpec, torch.dtype, torch.device, int, int, int | None], str | None]
    supports: Callable[[Call], str | None]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]


TIERS: dict[str, Tier] = {
    "library": Tier(lambda *of: library.expresses(*of[:5]), library.supports, library.forward, library.backward),
    "decode": Tier(flash.expresses, flash.supports_decode, flash.forward_decode, flash.backward),
    "flash": Tier(flash.expresses, flash.supports, flash.forward, flash.backward),
    "chunked": Tier(lambda *_: None, lambda _: None, chunked.forward, chunked.backward),
}
AUTO = {"cpu": ("library", "chunked"), "cuda": ("decode", "flash", "chunked")}  # by device, the likeliest first


def choose(tiers: str, call: Call) -> Tier:
    """The first of the tiers, named with commas between them, that supports the call; "auto" is those of its device.

    Raises ValueError where none does.
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
    """Why each tier that cannot run a spec, whatever the other sizes, cannot. With `capability`, on a device of that
    compute capability, which need not be there. On a GPU the library tier is a call that the graph itself makes."""
    reasons = {}
    for name, tier in TIERS.items():
        if name == "library" and device.type == "cuda":
            reasons[name] = fused.expresses(spec, dtype, device, head_dim, value_width, capability)
        elif name in AUTO.get(device.type, ("chunked",)):
            reasons[name] = tier.expresses(spec, dtype, device, head_dim, value_width, capability)
        else:
            reasons[name] = f"this tier does not run on {device.type}"
    return {name: why for name, why in reasons.items() if why is not None}


# -- what fits ----------------------------------------------------------------------------------
def require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(f"attnfx.attention: {message}")


def check(call: Call) -> None:
    spec, query, key, value, captures, sizes, seed, summary = (getattr(call, f.name) for f in fields(call))
    for name, x in (("query", query), ("key", key), ("value", value)):
        require(x.ndim == 4, f"{name} has {x.ndim} dims, expected 4")
        require(x.dtype in _FLOATS, f"{name} is {x.dtype}, expected a floating type")
        require(x.dtype == query.dtype, f"{name} is {x.dtype}, but query is {query.dtype}")
        require(x.device == query.device, f"{name} is on {x.device}, but query is on {query.device}")
    require(key.shape[0] == query.shape[0], f"key has batch {key.shape[0]}, but query has {query.shape[0]}")
    require(key.shape[3] == query.shape[3], f"key has head_dim {key.shape[3]}, but query has {query.shape[3]}")
    require(
        value.shape[:3] == key.shape[:3],
        f"value has batch, heads and length {tuple(value.shape[:3])}, but key has {tuple(key.shape[:3])}",
    )
    heads, groups = query.shape[1], key.shape[1]
    require(
        heads == groups == 0 or (groups > 0 and heads % groups == 0),
        f"query has {heads} heads, not a multiple of key's {groups}",
    )
    require(
        len(captures) == len(spec.captures),
        f"captures has {len(captures)} tensors, expected {len(spec.captures)}",
    )
    for n, (x, c) in enumerate(zip(captures, spec.captures)):
        require(x.ndim == c.ndim, f"captures[{n}] has {x.ndim} dims, expected {c.ndim}")
        require(x.device == query.device, f"captures[{n}] is on {x.device}, but query is on {query.device}")
        require(
            not c.grad or x.dtype in _FLOATS,
            f"captures[{n}] is {x.dtype}, but only a floating type can have a gradient",
        )
    require(len(sizes) == len(spec.sizes), f"sizes has {len(sizes)} numbers, expected {len(spec.sizes)}")
    if spec.random:
        require(seed is not None, "seed is None, but the spec has dropout")
        require(
            seed.dtype == torch.int64 and seed.numel() == 1,  # type: ignore[union-attr]
            f"seed is {seed.dtype} with {seed.numel()} elements, expected int64 with one element",  # type: ignore[union-attr]
        )
    if summary is not None:
        found = mask_summary.of(spec)
        require(found is not None, "summary is given, but the spec has no mask in a captured tensor")
        want = mask_summary.shape(found.spec, call.sizes)  # type: ignore[union-attr]
        require(summary.dtype == torch.uint8, f"summary is {summary.dtype}, expected torch.uint8")
        require(summary.device == query.device, f"summary is on {summary.device}, but query is on {query.device}")
        require(tuple(summary.shape) == want, f"summary has shape {tuple(summary.shape)}, expected {want}")


_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


# -- implementations ----------------------------------------------------------------------------
def _attention(query, key, value, captures, sizes, seed, spec, tier, summary=None):
    call = Call(from_json(spec), query, key, value, captures, sizes, seed, summary)
    check(call)
    return choose(tier, call).forward(call)


def _attention_backward(
    grad_out, query, key, value, out, logsumexp, captures, sizes, seed, spec, tier, summary=None, grad_logsumexp=None
):
    call = Call(from_json(spec), query, key, value, captures, sizes, seed, summary)
    check(call)
    require(grad_out.shape == out.shape, f"grad_out has shape {tuple(grad_out.shape)}, but out has {tuple(out.shape)}")
    if grad_logsumexp is not None:
        require(call.spec.normaliser == "softmax", "grad_logsumexp is given, but the spec has no softmax")
        have, want = tuple(grad_logsumexp.shape), tuple(logsumexp.shape)
        require(have == want, f"grad_logsumexp has shape {have}, but logsumexp has {want}")
    return choose(tier, call).backward(call, grad_out, out, logsumexp, grad_logsumexp)


def _fake_attention(query, key, value, captures, sizes, seed, spec, tier, summary=None):
    call = Call(from_json(spec), query, key, value, captures, sizes, seed, summary)
    check(call)
    return call.outputs()


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
    # register_autograd takes an empty list for a list of tensors, and any other list of numbers for one leaf
    of_rest = [None] * (3 if summary is None else 4)  # the dispatcher drops an argument that has its default
    return (*grads, of_captures, [] if not ctx.sizes else None, *of_rest)


def twice(ctx, *grads):
    raise RuntimeError("attnfx.attention cannot be differentiated twice: its backward pass has no derivative")


# -- autocast -----------------------------------------------------------------------------------
def _autocast(device: str, key_name: str, operator, tensors: int):
    """The operator with its first `tensors` operands cast as a matrix product's are."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key_name))

    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            if all(x.dtype == torch.float32 for x in args[:tensors]):
                to = torch.get_autocast_dtype(device)
                args = (*(x.to(to) for x in args[:tensors]), *args[tensors:])
            return operator(*args)

    return run


# -- operations ---------------------------------------------------------------------------------
def _flops(query_shape, key_shape, value_shape, *_, out_shape=None, **__) -> int:
    """Of the two contractions, every key counted: 2 * B * H * T * S * (D + Dv)."""
    b, h, t, d = query_shape
    return 2 * b * h * t * key_shape[2] * (d + value_shape[3])


def _flops_backward(grad_shape, query_shape, key_shape, value_shape, *_, out_shape=None, **__) -> int:
    """Of the five contractions, of which one recomputes the scores."""
    b, h, t, d = query_shape
    return 2 * b * h * t * key_shape[2] * (3 * d + 2 * value_shape[3])


_library = torch.library.Library("attnfx", "DEF")


def register(schema: str, real, fake, derivative, setup=None, autocast: int = 0, capturable: bool = True) -> None:
    """Define `attnfx::...`; under autocast, its first `autocast` operands are cast as a matrix product's are. One that
    is not `capturable` waits for numbers of the device: Inductor leaves it out of its CUDA graphs."""
    name = schema[: schema.index("(")]
    tags = (torch.Tag.pt2_compliant_tag,) if capturable else (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    _library.define(schema, tags=tags)
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnfx::{name}", fake, lib=_library)
    torch.library.register_autograd(f"attnfx::{name}", derivative, setup_context=setup, lib=_library)
    for device in ("cpu", "cuda") if autocast else ():
        key_name = f"Autocast{device.upper()}"
        call = getattr(torch.ops.attnfx, name)
        _library.impl(name, _autocast(device, key_name, call, autocast), key_name)


register(_FORWARD, _attention, _fake_attention, _differentiate, _setup, autocast=3)
register(_BACKWARD, _attention_backward, _fake_attention_backward, twice)
register_flop_formula(torch.ops.attnfx.attention)(_flops)
register_flop_formula(torch.ops.attnfx.attention_backward)(_flops_backward)


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
    """The attention that the spec describes, on any device; differentiable once.

    query (B, H, T, D), key (B, G, S, D), value (B, G, S, Dv) of one floating dtype, G a divisor of H; `captures` one
    tensor per slot of the spec, `sizes` one number per name in `spec.sizes`. `spec` is an AttentionSpec or its JSON
    text. `seed`, an int64 tensor of one element, fixes the dropout; without it PyTorch's generator gives one.
    Returns (B, H, T, Dv) in the spec's out_dtype. Raises ValueError for what does not fit, and for a tier that cannot
    run the call.
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
    """The summary of a call's mask, for this call alone, where the flash tier may run it and it is worth its cost."""
    if "flash" not in (AUTO.get(call.query.device.type, ()) if tier == "auto" else tier.split(",")):
        return None
    check(call)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))
    found = mask_summary.worth(call.spec, call.sizes, passes=3 if training else 1)
    if found is None or flash.supports(call) is not None:
        return None
    sizes = [call.sizes[n] for n in (*AXES.values(), *found.names)]
    return flash.summarise([call.captures[s] for s in found.slots], sizes, found.spec)


# Dynamo calls it while it traces. A spec cannot be the argument of such a function, but its owner.
torch.compiler.assume_constant_result(AttentionSpec.to_json)


@lru_cache(maxsize=1024)
def _text(spec: AttentionSpec) -> str:
    return spec.to_json()
