"""`memory_write`: the contract, the checks, the choice of backend."""

from torch import Tensor

from memformer_kernels import backend as backends
from memformer_kernels import checks
from memformer_kernels.ops.autocast import cast_to_autocast
from memformer_kernels.ops.memory_forget.api import SMALLEST_EPS
from memformer_kernels.ops.memory_write import autograd, eager

OP = "memory_write"


def memory_write(
    query: Tensor,
    own_key: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    scale: float | None = None,
    eps: float = 1e-12,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Slots are written: each attends to itself and to the segment's tokens, never to another slot; then forgets.

        p      = softmax(scale / temperature * [query . own_key ; query @ key^T])       1 + L weights a slot and head
        u      = p[own] * slots + p[tokens] @ value                                     head h takes chunk h of C
        output = (u + bias) / max(||u + bias||, eps)                                    u itself when `bias` is None

    Args:
        query, own_key: projections of the slots, [B, H, M, D]; float16, bfloat16, float32 or float64; any strides.
        slots: what a slot that attends only itself keeps, [B, M, C] with C = H * D; the dtype of `query` or float32,
            so that the memory may be carried in float32.
        key, value: projections of the tokens, [B, H, L, D], in the dtype of `query`.
        bias: [M, C], the dtype of `query` or float32; given, the forgetting of `memory_forget` is fused.
        token_mask: bool [B, L], True where a token is visible. What a hidden token holds, NaN included, never
            matters, and its gradient is exactly 0. With no visible token, u is `slots`, bit for bit.
        temperature: divides the logits; below 1 it sharpens the choice between keeping and writing.
        scale: multiplies the logits; `D ** -0.5` by default.
        eps: smallest norm divided by, with `bias`.
        allow_tf32: lets a kernel round float32 operands of the products to TF32; else float32 is IEEE float32.
        backend: "auto", "cuda", "triton" or "eager". A named backend runs or raises; see `explain`.

    Returns:
        The next slots, [B, M, C], in the dtype of `slots`.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it.
        NotImplementedError: the named backend cannot run this call.

    Precision: products accumulate in float32 (float64 for float64); one rounding at the store. Under autocast the
    four projections are cast to the autocast dtype; `slots` and `bias` are not.

    Source: Wu et al., Memformer, arXiv 2010.06891v2, sections 3.2 and 3.3.
    """
    call = prepare(
        query,
        own_key,
        slots,
        key,
        value,
        bias=bias,
        token_mask=token_mask,
        temperature=temperature,
        scale=scale,
        eps=eps,
        allow_tf32=allow_tf32,
    )
    chosen = backends.choose(OP, backend, call)
    if chosen == "eager":
        return eager.memory_write(*call)
    return autograd.apply(*call, chosen)


def prepare(
    query,
    own_key,
    slots,
    key,
    value,
    *,
    bias=None,
    token_mask=None,
    temperature=1.0,
    scale=None,
    eps=1e-12,
    allow_tf32=False,
) -> tuple:
    """Checks the arguments and returns them as every backend takes them, temperature folded into the scale."""
    _check(query, own_key, slots, key, value, bias, token_mask, temperature, scale, eps)
    query, own_key, key, value = cast_to_autocast(query, own_key, key, value)
    dtype = query.dtype
    if not dtype == own_key.dtype == key.dtype == value.dtype:
        checks.same_dtype(OP, "query", query=query, own_key=own_key, key=key, value=value)
    checks.carried_dtype(OP, "slots", slots, dtype)
    if bias is not None:
        checks.carried_dtype(OP, "bias", bias, dtype)
    if scale is None:
        scale = max(query.shape[3], 1) ** -0.5
    return query, own_key, slots, key, value, bias, token_mask, scale / temperature, float(eps), bool(allow_tf32)


@checks.once
def _check(query, own_key, slots, key, value, bias, token_mask, temperature, scale, eps) -> None:
    checks.tensor(OP, query=query, own_key=own_key, slots=slots, key=key, value=value)
    checks.shape(OP, "[B, H, M, D]", (-1, -1, -1, -1), query=query)
    batch, heads, count, width = query.shape
    checks.shape(OP, "[B, H, M, D]", tuple(query.shape), own_key=own_key)
    checks.shape(OP, "[B, M, H * D]", (batch, count, heads * width), slots=slots)
    checks.shape(OP, "[B, H, L, D]", (batch, heads, -1, width), key=key)
    checks.shape(OP, "[B, H, L, D]", tuple(key.shape), value=value)
    checks.mask(OP, "token_mask", "[B, L]", (batch, key.shape[2]), token_mask)
    checks.floating(OP, query=query, own_key=own_key, slots=slots, key=key, value=value)
    checks.same_device(
        OP, "query", query=query, own_key=own_key, slots=slots, key=key, value=value, token_mask=token_mask
    )
    if bias is not None:
        checks.tensor(OP, bias=bias)
        checks.shape(OP, "[M, C]", (count, heads * width), bias=bias)
        checks.floating(OP, bias=bias)
        checks.same_device(OP, "query", query=query, bias=bias)
    checks.positive(OP, temperature=temperature)
    if scale is not None:
        checks.positive(OP, scale=scale)
    checks.at_least(OP, SMALLEST_EPS, eps=eps)
