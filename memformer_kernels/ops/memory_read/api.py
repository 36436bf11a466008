"""`memory_read`: the contract, the checks, the choice of backend."""

from torch import Tensor

from memformer_kernels import backend as backends
from memformer_kernels import checks
from memformer_kernels.ops.autocast import cast_to_autocast
from memformer_kernels.ops.memory_read import autograd, eager

OP = "memory_read"


def memory_read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    slot_mask: Tensor | None = None,
    scale: float | None = None,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Tokens read the memory: attention of L tokens over M slots.

        output = softmax(scale * query @ key^T) @ value

    Args:
        query: projected tokens, [B, H, L, D]; float16, bfloat16, float32 or float64; any strides.
        key, value: projected slots, [B, H, M, D], in the dtype and on the device of `query`.
        slot_mask: bool [B, M], True where a slot may be read. What a hidden slot holds, NaN included, never matters,
            and its gradient is exactly 0.
        scale: multiplies the logits; `D ** -0.5` by default.
        allow_tf32: lets a kernel round float32 operands of the products to TF32; else float32 is IEEE float32.
        backend: "auto", "cuda", "triton" or "eager". A named backend runs or raises; see `explain`.

    Returns:
        [B, H, L, D] in the dtype of `query`. Exactly 0 where no slot is visible or M = 0.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it.
        NotImplementedError: the named backend cannot run this call.

    Precision: products accumulate in float32 (float64 for float64); one rounding at the store. Under autocast the
    inputs are cast to the autocast dtype.

    Source: Wu et al., Memformer, arXiv 2010.06891v2, section 3.2.
    """
    call = prepare(query, key, value, slot_mask=slot_mask, scale=scale, allow_tf32=allow_tf32)
    chosen = backends.choose(OP, backend, call)
    if chosen == "eager":
        return eager.memory_read(*call)
    return autograd.apply(*call, chosen)


def prepare(query, key, value, *, slot_mask=None, scale=None, allow_tf32=False) -> tuple:
    """Checks the arguments and returns them as every backend takes them."""
    _check(query, key, value, slot_mask, scale)
    query, key, value = cast_to_autocast(query, key, value)
    if not query.dtype == key.dtype == value.dtype:
        checks.same_dtype(OP, "query", query=query, key=key, value=value)
    if scale is None:
        scale = max(query.shape[3], 1) ** -0.5
    return query, key, value, slot_mask, float(scale), bool(allow_tf32)


@checks.once
def _check(query, key, value, slot_mask, scale) -> None:
    checks.tensor(OP, query=query, key=key, value=value)
    checks.shape(OP, "[B, H, L, D]", (-1, -1, -1, -1), query=query)
    batch, heads, _, width = query.shape
    checks.shape(OP, "[B, H, M, D]", (batch, heads, -1, width), key=key)
    checks.shape(OP, "[B, H, M, D]", tuple(key.shape), value=value)
    checks.mask(OP, "slot_mask", "[B, M]", (batch, key.shape[2]), slot_mask)
    checks.floating(OP, query=query, key=key, value=value)
    checks.same_device(OP, "query", query=query, key=key, value=value, slot_mask=slot_mask)
    if scale is not None:
        checks.positive(OP, scale=scale)
