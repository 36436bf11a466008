"""`memory_write` for autograd and `torch.compile`: one Function for every fused backend."""

import torch
from torch import Tensor

from memformer_kernels.ops.library import refuse_double_backward, register_pair
from memformer_kernels.ops.precision import wide_dtype


def _fake_forward(query, own_key, slots, key, value, bias, token_mask, scale, eps, backend):
    wide = wide_dtype(slots)
    return (
        slots.new_empty(slots.shape),
        slots.new_empty(slots.shape, dtype=wide),
        slots.new_empty(query.shape[:3], dtype=wide),
        slots.new_empty(slots.shape[:2], dtype=wide),
    )


def _fake_backward(
    grad, query, own_key, slots, key, value, bias, token_mask, attended, log_sum_exp, inv_norm, scale, eps, backend
):
    tensors = (query, own_key, slots, key, value)
    grad_bias = grad.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return *(t.new_empty(t.shape) for t in tensors), grad_bias


_CALL = "Tensor query, Tensor own_key, Tensor slots, Tensor key, Tensor value, Tensor? bias, Tensor? token_mask"
_forward, _backward = register_pair(
    "memory_write",
    f"({_CALL}, float scale, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    f"(Tensor grad, {_CALL}, Tensor attended, Tensor log_sum_exp, Tensor inv_norm, float scale, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)


class MemoryWrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, own_key, slots, key, value, bias, token_mask, scale, eps, backend):
        call = (query, own_key, slots, key, value, bias, token_mask)
        output, attended, log_sum_exp, inv_norm = _forward(*call, scale, eps, backend)
        ctx.save_for_backward(*call, attended, log_sum_exp, inv_norm)
        ctx.options = scale, eps, backend
        return output

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("memory_write")
        *grads, grad_bias = _backward(grad, *ctx.saved_tensors, *ctx.options)
        has_bias = ctx.needs_input_grad[5]
        return *grads, grad_bias if has_bias else None, None, None, None, None


def apply(*call_and_backend) -> Tensor:
    """`apply(*prepare(...), backend)`."""
    return MemoryWrite.apply(*call_and_backend)
