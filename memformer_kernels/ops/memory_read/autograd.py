"""`memory_read` for autograd and `torch.compile`: one Function for every fused backend."""

import torch
from torch import Tensor

from memformer_kernels import backend as backends
from memformer_kernels.ops.library import needs_grad, refuse_double_backward, register_pair
from memformer_kernels.ops.per_head import new_per_head
from memformer_kernels.ops.precision import wide_dtype


def _fake_forward(query, key, value, slot_mask, scale, allow_tf32, save, backend):
    saves_log_sum_exp, saves_output = backends.implementation("memory_read", backend).saves(query, key)
    saved = save and saves_log_sum_exp
    log_sum_exp = query.new_empty(query.shape[:3], dtype=wide_dtype(query)) if saved else query.new_empty(0)
    rounds = save and saves_output and query.dtype != torch.float32
    rounding = new_per_head(query, query.shape[2]) if rounds else query.new_empty(0)
    return new_per_head(query, query.shape[2]), log_sum_exp, rounding


def _fake_backward(grad, query, key, value, slot_mask, output, log_sum_exp, rounding, scale, allow_tf32, backend):
    return tuple(new_per_head(t, t.shape[2]) for t in (query, key, value))


_CALL = "Tensor query, Tensor key, Tensor value, Tensor? slot_mask"
_forward, _backward = register_pair(
    "memory_read",
    f"({_CALL}, float scale, bool allow_tf32, bool save, str backend) -> (Tensor, Tensor, Tensor)",
    f"(Tensor grad, {_CALL}, Tensor? output, Tensor? log_sum_exp, Tensor? rounding, float scale, bool allow_tf32,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)


class MemoryRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, slot_mask, scale, allow_tf32, backend):
        output, log_sum_exp, rounding = _forward(query, key, value, slot_mask, scale, allow_tf32, True, backend)
        saves_log_sum_exp, saves_output = backends.implementation("memory_read", backend).saves(query, key)
        saved = log_sum_exp if saves_log_sum_exp else None, *((output, rounding) if saves_output else (None, None))
        ctx.save_for_backward(query, key, value, slot_mask, saved[1], saved[0], saved[2])
        ctx.options = scale, allow_tf32, backend
        return output

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("memory_read")
        return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


def apply(*call_and_backend) -> Tensor:
    """`apply(*prepare(...), backend)`."""
    if needs_grad(*call_and_backend[:3]):
        return MemoryRead.apply(*call_and_backend)
    *call, backend = call_and_backend
    return _forward(*call, False, backend)[0]
