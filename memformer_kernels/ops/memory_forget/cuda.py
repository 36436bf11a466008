"""`memory_forget` in CUDA C++: its limits, its buffers, the calls into the compiled module.

The kernels and their mathematics are in `csrc/include/memformer_kernels/memory_forget.cuh`.
"""

import torch
from torch import Tensor

from memformer_kernels import _extension, checks

DTYPES = torch.float32, torch.float16, torch.bfloat16

# The backward gives each slot of each group of batches to one team of threads, 16 channels a thread, so this many
# elements of [groups, M, C] keep a GPU busy: 132 multiprocessors x 512 threads x 16, as a power of two. More groups
# would only cost a bigger scratch buffer, and past 256 the sum over the groups, one thread an element, would be what
# takes the time. Constants, not the size of the device at hand: the order of the sums must not depend on it.
ELEMENTS_TO_FILL_A_GPU = 2**20
MOST_GROUPS = 256


def unsupported_reason(slots: Tensor, bias: Tensor, eps: float = 1e-12) -> str | None:
    for name, tensor in (("slots", slots), ("bias", bias)):
        if not tensor.is_cuda:
            return f"{name} must be on a CUDA device, got {tensor.device}"
    if slots.dtype not in DTYPES:
        return f"slots must be float32, float16 or bfloat16, got {slots.dtype}"
    if bias.dtype != slots.dtype:
        return f"bias must have the dtype of slots ({slots.dtype}), got {bias.dtype}"
    if (reason := checks.unsupported_eps(eps) or _extension.why_not()) is not None:
        return reason
    width, limit = slots.shape[-1], _extension.load().memory_forget_max_width
    if width > limit:
        return f"slots must have at most {limit} channels, got {width}"
    return _extension.why_not_on(slots.device.index)


def forward(slots: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(output, inv_norm)`; output is contiguous, inv_norm float32 [B, M]."""
    B, M, C = slots.shape
    output = slots.new_empty(slots.shape)
    inv_norm = slots.new_empty((B, M), dtype=torch.float32)
    if output.numel() == 0:
        return output, inv_norm.fill_(1 / eps)
    extension = _extension.load()
    with _extension.on_device(slots.device):
        extension.memory_forget_forward(
            _extension.dtype(slots.dtype),
            *map(_extension.strided, (slots, bias)),
            *map(_extension.address, (output, inv_norm)),
            B,
            M,
            C,
            1 / eps,
            torch._C._cuda_getCurrentRawStream(slots.device.index),
        )
    return output, inv_norm


def backward(grad_output: Tensor, slots: Tensor, bias: Tensor, inv_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(grad_slots, grad_bias)`, both contiguous; grad_bias is summed in float32, always in the same order."""
    B, M, C = slots.shape
    grad_slots = slots.new_empty(slots.shape)
    if grad_slots.numel() == 0:
        return grad_slots, bias.new_zeros(bias.shape)
    grad_bias = bias.new_empty(bias.shape)
    inv_norm = inv_norm.contiguous()
    groups = min(B, MOST_GROUPS, max(1, ELEMENTS_TO_FILL_A_GPU // (M * C)))
    group_size = -(-B // groups)
    groups = -(-B // group_size)  # none is empty
    partial = bias.new_empty((groups if groups > 1 else 0, M, C), dtype=torch.float32)
    extension = _extension.load()
    with _extension.on_device(slots.device):
        extension.memory_forget_backward(
            _extension.dtype(slots.dtype),
            *map(_extension.strided, (grad_output, slots, bias)),
            *map(_extension.address, (inv_norm, grad_slots, grad_bias, partial)),
            groups,
            group_size,
            B,
            M,
            C,
            1 / eps,
            torch._C._cuda_getCurrentRawStream(slots.device.index),
        )
    return grad_slots, grad_bias
