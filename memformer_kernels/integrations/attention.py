"""`memory_read` under the arguments of `torch.nn.functional.scaled_dot_product_attention`."""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memformer_kernels import backend as backends
from memformer_kernels.ops.memory_read import memory_read

MOST_KEYS = 128  # the most that docs/accelerate.md has measured; memory_read alone is ahead up to 512 on Hopper


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of many queries to few keys, in the place of `scaled_dot_product_attention`.

        output = softmax(scale * query @ key^T, -inf where not attn_mask) @ value

    `memory_read` runs where it can: query [B, H, L, D], key and value [B, H, M, D] with M up to 128, or with
    `enable_gqa` fewer heads of them; not causal, no dropout; no mask, or a bool mask that is the same for every head
    and query: [B or 1, 1, 1, M], or expanded from that. All else `scaled_dot_product_attention` does, with the same
    arguments; `unsupported_reason` in `memformer_kernels.integrations.attention` says why. What the tensors hold is not
    looked at, and decides nothing.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as PyTorch documents them.

    Returns:
        [B, H, L, D] in the dtype of `query`, under autocast in autocast's. 0 where a query sees no key.

    Raises:
        What `scaled_dot_product_attention` raises, which is handed every call that breaks its rules.

    Precision: that of `memory_read` where it runs.
    """
    options = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    call = _as_memory_read(query, key, value, **options)
    if isinstance(call, str):
        return scaled_dot_product_attention(query, key, value, **options)
    rows, slot_mask = call
    return memory_read(rows, key, value, slot_mask=slot_mask, scale=scale).reshape(query.shape)


def unsupported_reason(query: Tensor, key: Tensor, value: Tensor, **options: object) -> str | None:
    """Why `cross_attention(query, key, value, **options)` is a call of `scaled_dot_product_attention`, or None."""
    call = _as_memory_read(query, key, value, **options)
    return call if isinstance(call, str) else None


def _as_memory_read(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> tuple[Tensor, Tensor | None] | str:
    """`(query, slot_mask)` of the call of `memory_read`, or why there is none."""
    if dropout_p or is_causal:
        return "dropout of the weights" if dropout_p else "a causal mask"
    if query.dim() != 4 or query.numel() == 0:
        return "query is not [B, H, L, D] with something in it"
    batch, heads, length, width = query.shape
    if key.dim() != 4 or key.shape != value.shape or (key.shape[0], key.shape[3]) != (batch, width):
        return "key and value are not both [B, H, M, D] with the B and D of query"
    key_heads, keys = key.shape[1:3]
    if not 0 < keys <= MOST_KEYS:
        return f"{keys} keys are not 1 to {MOST_KEYS}"
    if key_heads != heads and not (enable_gqa and key_heads and heads % key_heads == 0):
        return f"{heads} heads of query on {key_heads} of key"
    if len({(t.dtype, t.device) for t in (query, key, value)}) > 1 or not query.is_floating_point():
        return "query, key and value are not of one floating-point dtype on one device"
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        return "scale is not finite and above 0"
    slot_mask = None
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool or attn_mask.device != query.device:
            return "a mask that is added to the logits" if attn_mask.is_floating_point() else "a mask that is not bool"
        try:
            attn_mask = attn_mask.expand(batch, heads, length, keys) if attn_mask.dim() > 1 else None
        except RuntimeError:
            attn_mask = None
        if attn_mask is None:
            return "a mask that is not broadcast to [B, H, L, M]"
        if any(attn_mask.shape[i] > 1 and attn_mask.stride(i) for i in (1, 2)):
            return "a mask with a row for every head or query"
        slot_mask = attn_mask[:, 0, 0]
    # key head h serves a group of query heads that stand next to one another: to it they are more tokens
    rows = query if key_heads == heads else query.reshape(batch, key_heads, -1, width)
    call = rows, key, value, slot_mask, width**-0.5 if scale is None else float(scale), False
    if query.is_cuda and all(backends.unsupported_reason("memory_read", name, call) for name in backends.FUSED):
        return "no kernel of memory_read runs this call on the GPU"
    return rows, slot_mask
