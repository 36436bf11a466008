"""`memory_forget` for autograd and `torch.compile`: one Function for every fused backend."""

import torch
from torch import Tensor

from memformer_kernels.ops.library import needs_grad, refuse_double_backward, register_pair
from memformer_kernels.ops.precision import wide_dtype


def _fake_forward(slots, bias, eps, backend):
    return slots.new_empty(slots.shape), slots.new_empty(slots.shape[:2], dtype=wide_dtype(slots))


def _fake_backward(grad, slots, bias, inv_norm, eps, backend):
    return slots.new_empty(slots.shape), bias.new_empty(bias.shape)


_forward, _backward = register_pair(
    "memory_forget",
    "(Tensor slots, Tensor bias, float eps, str backend) -> (Tensor, Tensor)",
    "(Tensor grad, Tensor slots, Tensor bias, Tensor inv_norm, float eps, str backend) -> (Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)


class MemoryForget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, bias, eps, backend):
        output, inv_norm = _forward(slots, bias, eps, backend)
        ctx.save_for_backward(slots, bias, inv_norm)
        ctx.eps, ctx.backend = eps, backend
        return output

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("memory_forget")
        return *_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.backend), None, None


def apply(slots: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    if needs_grad(slots, bias):
        return MemoryForget.apply(slots, bias, eps, backend)
    return _forward(slots, bias, eps, backend)[0]
