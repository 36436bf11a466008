"""`memory_forget` in Triton, for GPUs on which the CUDA extension is not built.

z = slots + bias     output = z / max(||z||, eps)     grad_slots = grad through that     grad_bias = sum over B of it

One program holds a slot's row in registers. The backward adds up the bias gradient over groups of batch rows, then
over the groups, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memformer_kernels import checks, launch, tiles
from memformer_kernels.partials import sum_partials
from memformer_kernels.triton_helpers import normalise, normalise_backward, wait_for_kernels_before

MOST_CHANNELS = 32768  # of a row in registers, at 1024 threads


@triton.jit(do_not_specialize=["M", "C"])
def _memory_forget_forward_kernel(
    slots,  # [B, M, C]
    bias,  # [M, C]
    output,  # [B, M, C], contiguous
    inv_norm,  # [B, M] float32
    slots_strides,
    bias_strides,
    eps,
    inv_eps,
    M,
    C,
    BLOCK_C: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    row = tl.program_id(0)
    batch = (row // M).to(tl.int64)
    slot = (row % M).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    inside = channels < C
    slots += batch * slots_strides[0] + slot * slots_strides[1]
    z = tl.load(slots + channels * slots_strides[2], mask=inside, other=0.0).to(tl.float32)
    z += tl.load(bias + slot * bias_strides[0] + channels * bias_strides[1], mask=inside, other=0.0).to(tl.float32)
    unit, inverse = normalise(z, eps, inv_eps)
    tl.store(inv_norm + row, inverse)
    tl.store(output + row.to(tl.int64) * C + channels, unit.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "M", "C", "group"])
def _memory_forget_backward_kernel(
    grad,  # [B, M, C]
    slots,  # [B, M, C]
    bias,  # [M, C]
    inv_norm,  # [B, M] float32
    grad_slots,  # [B, M, C], contiguous
    grad_bias,  # [groups, M, C], float32 or, of one group, the bias gradient
    grad_strides,
    slots_strides,
    bias_strides,
    inv_eps,
    B,
    M,
    C,
    group,  # batch rows of one program
    BLOCK_C: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    slot = (tl.program_id(0) % M).to(tl.int64)
    part = tl.program_id(0) // M
    channels = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    inside = channels < C
    b = tl.load(bias + slot * bias_strides[0] + channels * bias_strides[1], mask=inside, other=0.0).to(tl.float32)
    db = tl.zeros([1, BLOCK_C], tl.float32)
    grad += slot * grad_strides[1] + channels * grad_strides[2]
    slots += slot * slots_strides[1] + channels * slots_strides[2]
    for index in range(part * group, min((part + 1) * group, B)):
        batch = tl.cast(index, tl.int64)
        g = tl.load(grad + batch * grad_strides[0], mask=inside, other=0.0).to(tl.float32)
        z = tl.load(slots + batch * slots_strides[0], mask=inside, other=0.0).to(tl.float32) + b
        dz = normalise_backward(g, z, tl.load(inv_norm + batch * M + slot), inv_eps)
        tl.store(grad_slots + (batch * M + slot) * C + channels, dz.to(grad_slots.dtype.element_ty), mask=inside)
        db += dz
    places = (part.to(tl.int64) * M + slot) * C + channels
    tl.store(grad_bias + places, db.to(grad_bias.dtype.element_ty), mask=inside)


def unsupported_reason(slots: Tensor, bias: Tensor, eps: float = 1e-12) -> str | None:
    reason = launch.unsupported_reason(slots=slots, bias=bias)
    if reason is None and slots.shape[-1] > MOST_CHANNELS:
        reason = f"slots must have at most {MOST_CHANNELS} channels, got {slots.shape[-1]}"
    return reason or checks.unsupported_eps(eps)


@launch.planned
def _forward_plan(shape, slots_strides, bias_strides, dtypes, device, eps) -> launch.Launcher:
    B, M, C = shape
    arguments = slots_strides, bias_strides, eps, 1 / eps, M, C
    return launch.Launcher(_memory_forget_forward_kernel, B * M, arguments, **tiles.row(C))


def forward(slots: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(output, inv_norm)`; output is contiguous, inv_norm float32 [B, M]."""
    output = slots.new_empty(slots.shape)
    inv_norm = slots.new_empty(slots.shape[:2], dtype=torch.float32)
    if output.numel() == 0:
        return output, inv_norm.fill_(1 / eps)
    dtypes = slots.dtype, bias.dtype
    run = _forward_plan(slots.shape, slots.stride(), bias.stride(), dtypes, slots.device, eps)
    run(slots, bias, output, inv_norm)
    return output, inv_norm


@launch.planned
def _backward_plan(shape, grad_strides, slots_strides, bias_strides, dtypes, device, eps):
    """`(groups of the batch, launcher, launcher of the sum over them)`."""
    B, M, C = shape
    groups, group = tiles.batch_groups(B)
    arguments = grad_strides, slots_strides, bias_strides, 1 / eps, B, M, C, group
    run = launch.Launcher(_memory_forget_backward_kernel, groups * M, arguments, **tiles.row(C))
    return groups, run, sum_partials(groups, M * C, dtypes[-1], device)


def backward(grad: Tensor, slots: Tensor, bias: Tensor, inv_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(grad_slots, grad_bias)`, both contiguous; grad_bias is summed in float32, always in the same order."""
    grad_slots, grad_bias = slots.new_empty(slots.shape), bias.new_empty(bias.shape)
    if grad_slots.numel() == 0:
        return grad_slots, grad_bias.zero_()
    dtypes = grad.dtype, slots.dtype, bias.dtype
    strides = grad.stride(), slots.stride(), bias.stride()
    groups, run, add_groups = _backward_plan(slots.shape, *strides, dtypes, slots.device, eps)
    partial = grad_bias if groups == 1 else bias.new_empty((groups, *bias.shape), dtype=torch.float32)
    run(grad, slots, bias, inv_norm.contiguous(), grad_slots, partial)
    if groups > 1:
        add_groups(partial, grad_bias)
    return grad_slots, grad_bias
