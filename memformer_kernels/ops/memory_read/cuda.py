"""`memory_read` in CUDA C++: its limits, its buffers, the call into the compiled module.

The forward, for more slots than Triton's kernels are ahead at; `csrc/include/memformer_kernels/memory_read.cuh` has the
kernel. The backward is Triton's.
"""

import torch
from torch import Tensor

from memformer_kernels import _extension, tiles
from memformer_kernels.compiling import constant
from memformer_kernels.ops.memory_read import triton
from memformer_kernels.ops.memory_read.triton import backward, saves_log_sum_exp  # noqa: F401
from memformer_kernels.ops.per_head import new_per_head
from memformer_kernels.triton_helpers import LOG2_E

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}  # names in the module
ARCHITECTURE = 90  # and compiled for 90a: TMA and the matrix products of warpgroups are Hopper's alone
LEAST_SLOTS = 321


def unsupported_reason(
    query: Tensor, key: Tensor, value: Tensor, slot_mask: Tensor | None, scale: float, allow_tf32: bool
) -> str | None:
    if not query.is_cuda:
        return f"query must be on a CUDA device, got {query.device}"
    if query.dtype not in DTYPES:
        return f"query must be float16 or bfloat16, got {query.dtype}"
    if (reason := triton.unsupported_reason(query, key, value, slot_mask, scale, allow_tf32)) is not None:
        return reason
    if key.shape[2] < LEAST_SLOTS:
        return f"key must have at least {LEAST_SLOTS} slots, got {key.shape[2]}: for fewer, Triton's kernels are ahead"
    if (reason := _extension.why_not()) is not None:
        return reason
    limit = _extension.load().memory_read_max_channels
    if query.shape[3] > limit:
        return f"query must have at most {limit} channels a head, got {query.shape[3]}"
    return _unsupported_device(query.device.index)


@constant  # to `torch.compile`, which looks through a cache
def _unsupported_device(index: int) -> str | None:
    compiled_for = _extension.load().architectures
    if tiles.architecture(torch.device("cuda", index)) == ARCHITECTURE and "90a" in compiled_for.split(";"):
        return None
    return f"the GPU must have compute capability 9.0, and the CUDA kernels be compiled for 90a, got {compiled_for}"


def forward(
    query: Tensor, key: Tensor, value: Tensor, slot_mask: Tensor | None, scale: float, allow_tf32: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(output, log_sum_exp, rounding)`, as Triton's: the same function, in other tiles."""
    B, H, L, D = query.shape
    output, log_sum_exp, rounding = new_per_head(query, L), None, None
    if save:
        log_sum_exp, rounding = query.new_empty((B, H, L), dtype=torch.float32), new_per_head(query, L)
    if output.numel() == 0:
        return output, log_sum_exp, rounding
    extension = _extension.load()
    with _extension.on_device(query.device):
        extension.memory_read_forward(
            getattr(extension, DTYPES[query.dtype]),
            query.data_ptr(),
            query.stride(),
            key.data_ptr(),
            key.stride(),
            value.data_ptr(),
            value.stride(),
            0 if slot_mask is None else slot_mask.data_ptr(),
            (0, 0) if slot_mask is None else slot_mask.stride(),
            output.data_ptr(),
            0 if log_sum_exp is None else log_sum_exp.data_ptr(),
            0 if rounding is None else rounding.data_ptr(),
            B,
            H,
            L,
            key.shape[2],
            D,
            scale * LOG2_E,
            tiles.multiprocessors(query.device),
            torch._C._cuda_getCurrentRawStream(query.device.index),
        )
    return output, log_sum_exp, rounding
