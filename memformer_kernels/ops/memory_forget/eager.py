"""`memory_forget` in plain PyTorch: the definition, and the forward and backward that every kernel mirrors.

The mathematics stands in `ops/normalisation.py`, with z = slots + bias.
"""

import torch
from torch import Tensor

from memformer_kernels.ops.normalisation import normalise, normalise_backward
from memformer_kernels.ops.precision import wide


def memory_forget(slots: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition; autograd differentiates it, to any order."""
    return normalise(wide(slots) + wide(bias), eps)[0].to(slots.dtype)


def forward(slots: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(output, inv_norm)`; inv_norm is float32 [B, M]."""
    with torch.no_grad():
        unit, inv_norm = normalise(wide(slots) + wide(bias), eps)
        return unit.to(slots.dtype).contiguous(), inv_norm.contiguous()


def backward(grad: Tensor, slots: Tensor, bias: Tensor, inv_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(grad_slots, grad_bias)`."""
    grad_z = normalise_backward(wide(grad), wide(slots) + wide(bias), inv_norm, eps)
    return grad_z.to(slots.dtype), grad_z.sum(0).to(bias.dtype)
