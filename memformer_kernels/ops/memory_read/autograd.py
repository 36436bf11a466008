"""`memory_read` for autograd and `torch.compile`: one Function for every fused backend."""

import torch
from torch import Tensor

from memformer_kernels.ops.library import refuse_double_backward, register_pair


def _fake_forward(query, key, value, slot_mask, scale, backend):
    return query.new_empty(query.shape)


def _fake_backward(grad, query, key, value, slot_mask, scale, backend):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_forward, _backward = register_pair(
    "memory_read",
    "(Tensor query, Tensor key, Tensor value, Tensor? slot_mask, float scale, str backend) -> Tensor",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? slot_mask, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)


class MemoryRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, slot_mask, scale, backend):
        ctx.save_for_backward(query, key, value, slot_mask)
        ctx.scale, ctx.backend = scale, backend
        return _forward(query, key, value, slot_mask, scale, backend)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("memory_read")
        return *_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None


def apply(query: Tensor, key: Tensor, value: Tensor, slot_mask: Tensor | None, scale: float, backend: str) -> Tensor:
    return MemoryRead.apply(query, key, value, slot_mask, scale, backend)
