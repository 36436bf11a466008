"""`memory_read` in plain PyTorch: the definition, and the forward and backward that every kernel mirrors.

s = scale * query @ key^T, -inf where hidden       [B, H, L, M]
p = softmax(s), 0 in a row that sees nothing       output = p @ value

grad_value = p^T @ grad
ds         = p * (grad @ value^T - rowsum(p * (grad @ value^T)))
grad_query = scale * ds @ key        grad_key = scale * ds^T @ query
"""

import torch
from torch import Tensor

from memformer_kernels.ops.autocast import outside_autocast
from memformer_kernels.ops.precision import wide


@outside_autocast
def memory_read(
    query: Tensor, key: Tensor, value: Tensor, slot_mask: Tensor | None, scale: float, allow_tf32: bool
) -> Tensor:
    """The definition; autograd differentiates it, to any order. TF32 is up to PyTorch's own setting."""
    key, value = _without_hidden(key, slot_mask), _without_hidden(value, slot_mask)
    weights = _weights(wide(query), wide(key), slot_mask, scale)
    return (weights @ wide(value)).to(query.dtype)


def saves(query: Tensor, key: Tensor) -> tuple[bool, bool]:
    """Whether `backward` takes the log-sum-exp, and output and rounding, from `forward`: the softmax is made anew."""
    return False, False


def forward(
    query: Tensor, key: Tensor, value: Tensor, slot_mask: Tensor | None, scale: float, allow_tf32: bool, save: bool
) -> tuple[Tensor, None, None]:
    with torch.no_grad():
        return memory_read(query, key, value, slot_mask, scale, allow_tf32), None, None


@outside_autocast
def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mask: Tensor | None,
    output: None,
    log_sum_exp: None,
    rounding: None,
    scale: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, g = wide(query), wide(_without_hidden(key, slot_mask)), wide(_without_hidden(value, slot_mask)), wide(grad)
    p = _weights(q, k, slot_mask, scale)
    dp = g @ v.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    grad_query, grad_key, grad_value = ds @ k, ds.mT @ q, p.mT @ g
    if slot_mask is not None:
        grad_query = grad_query.masked_fill(~slot_mask.any(-1)[:, None, None, None], 0)
    grad_key, grad_value = _without_hidden(grad_key, slot_mask), _without_hidden(grad_value, slot_mask)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _weights(query: Tensor, key: Tensor, slot_mask: Tensor | None, scale: float) -> Tensor:
    logits = (query @ key.mT) * scale
    if slot_mask is None:
        return logits.softmax(-1)
    hidden = ~slot_mask[:, None, None, :]
    blind = ~slot_mask.any(-1)[:, None, None, None]
    # a row of -inf alone would be NaN: it gets finite logits, and weights of 0 afterwards
    return logits.masked_fill(hidden, float("-inf")).masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def _without_hidden(slots: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Hidden slots as zeros: their weight is 0, but 0 * NaN is not."""
    return slots if slot_mask is None else slots.masked_fill(~slot_mask[:, None, :, None], 0)
