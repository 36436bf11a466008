"""`memory_write` for autograd and `torch.compile`: one Function for every fused backend."""

import torch
from torch import Tensor

from memformer_kernels.ops.library import needs_grad, refuse_double_backward, register_pair
from memformer_kernels.ops.per_head import new_per_head
from memformer_kernels.ops.precision import wide_dtype


def _fake_forward(query, own_key, slots, key, value, bias, token_mask, scale, eps, allow_tf32, save, backend):
    batch, heads, count, _ = query.shape
    shapes = slots.shape, *[(batch, heads, count)] * 3, (batch, count)
    saved = (slots.new_empty(s, dtype=wide_dtype(slots)) if save else query.new_empty(0) for s in shapes)
    return slots.new_empty(slots.shape), *saved


def _fake_backward(
    grad,
    query,
    own_key,
    slots,
    key,
    value,
    bias,
    token_mask,
    attended,
    inv_total,
    log_sum_exp,
    own_weight,
    inv_norm,
    scale,
    eps,
    allow_tf32,
    backend,
):
    grad_query, grad_own_key, grad_key, grad_value = (new_per_head(t, t.shape[2]) for t in (query, own_key, key, value))
    grad_bias = grad.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return grad_query, grad_own_key, slots.new_empty(slots.shape), grad_key, grad_value, grad_bias


_CALL = "Tensor query, Tensor own_key, Tensor slots, Tensor key, Tensor value, Tensor? bias, Tensor? token_mask"
_SAVED = "Tensor attended, Tensor inv_total, Tensor log_sum_exp, Tensor own_weight, Tensor inv_norm"
_OPTIONS = "float scale, float eps, bool allow_tf32"
_forward, _backward = register_pair(
    "memory_write",
    f"({_CALL}, {_OPTIONS}, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"(Tensor grad, {_CALL}, {_SAVED}, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)


class MemoryWrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, own_key, slots, key, value, bias, token_mask, scale, eps, allow_tf32, backend):
        call = (query, own_key, slots, key, value, bias, token_mask)
        output, *saved = _forward(*call, scale, eps, allow_tf32, True, backend)
        ctx.save_for_backward(*call, *saved)
        ctx.options = scale, eps, allow_tf32, backend
        return output

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("memory_write")
        *grads, grad_bias = _backward(grad, *ctx.saved_tensors, *ctx.options)
        has_bias = ctx.needs_input_grad[5]
        return *grads, grad_bias if has_bias else None, None, None, None, None, None


def apply(*call_and_backend) -> Tensor:
    """`apply(*prepare(...), backend)`."""
    if needs_grad(*call_and_backend[:6]):
        return MemoryWrite.apply(*call_and_backend)
    *call, backend = call_and_backend
    return _forward(*call, False, backend)[0]
