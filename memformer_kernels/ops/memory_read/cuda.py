"""`memory_read` in CUDA C++, from 65 slots on, where it is ahead of Triton's kernels: its limits, its buffers, the
calls into the compiled module. `csrc/include/memformer_kernels/memory_read_forward.cuh` and `memory_read_backward.cuh`
have the kernels.
"""

import torch
from torch import Tensor

from memformer_kernels import _extension, tiles
from memformer_kernels.hopper import DTYPES, chunk_of_tokens, in_vectors, unsupported_device, without_padding
from memformer_kernels.ops.memory_read import triton
from memformer_kernels.ops.per_head import in_per_head, new_per_head
from memformer_kernels.partials import sum_partials
from memformer_kernels.triton_helpers import LOG2_E

LEAST_SLOTS = 65
ALONE = 128  # slots that one block holds in the backward, which then needs no output
CHUNK = 8192  # tokens that one sum is over in the backward: one row of that many keeps a GPU busy
CHUNK_ALONE = 1024  # with one block a head: fewer cost a large batch the traffic of more partial results


def saves(query: Tensor, key: Tensor) -> tuple[bool, bool]:
    """Whether the backward needs the log-sum-exp, and output and rounding."""
    return True, key.shape[2] > ALONE


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
    return unsupported_device(query.device.index)


def forward(
    query: Tensor, key: Tensor, value: Tensor, slot_mask: Tensor | None, scale: float, allow_tf32: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(output, log_sum_exp, rounding)`, as Triton's; the log-sum-exp with any number of slots."""
    (B, H, L, D), slots = query.shape, key.shape[2]
    query, key, value = map(in_vectors, (query, key, value))
    output, log_sum_exp, rounding = new_per_head(query, L), None, None
    if save:
        log_sum_exp = query.new_empty((B, H, L), dtype=torch.float32)
        rounding = new_per_head(query, L) if slots > ALONE else None
    if query.numel() > 0:
        extension = _extension.load()
        with _extension.on_device(query.device):
            extension.memory_read_forward(
                _extension.dtype(query.dtype),
                *map(_extension.strided, (query, key, value, slot_mask)),
                *map(_extension.address, (output, log_sum_exp, rounding)),
                B,
                H,
                L,
                slots,
                query.shape[3],
                scale * LOG2_E,
                tiles.multiprocessors(query.device),
                torch._C._cuda_getCurrentRawStream(query.device.index),
            )
    output, rounding = (t if t is None else without_padding(t, D) for t in (output, rounding))
    return output, log_sum_exp, rounding


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mask: Tensor | None,
    output: Tensor | None,
    log_sum_exp: Tensor,
    rounding: Tensor | None,
    scale: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    B, H, L, D = query.shape
    slots = key.shape[2]
    if query.numel() == 0:
        return new_per_head(query, L), new_per_head(key, slots).zero_(), new_per_head(key, slots).zero_()
    grad, query, key, value = map(in_vectors, (grad, query, key, value))
    log_sum_exp = log_sum_exp.contiguous()
    extension = _extension.load()
    statistics = carry = None
    chunk = chunk_of_tokens(L, CHUNK_ALONE, extension.memory_read_backward_tokens)
    if slots > ALONE:
        output, rounding = (in_vectors(in_per_head(tensor)) for tensor in (output, rounding))
        chunk = CHUNK
        tokens = extension.memory_read_backward_tokens
        statistics = query.new_empty((B * H * -(-L // tokens), 2, tokens), dtype=torch.float32)
    if slots > extension.memory_read_backward_slots:
        carry = query.new_empty(query.numel(), dtype=torch.float32)
    grad_query, grad_key, grad_value = new_per_head(query, L), new_per_head(key, slots), new_per_head(key, slots)
    sums = grad_key, grad_value
    chunks = -(-L // chunk)
    if chunks > 1:
        sums = key.new_empty((2, chunks, grad_key.numel()), dtype=torch.float32).unbind()
    with _extension.on_device(query.device):
        extension.memory_read_backward(
            _extension.dtype(query.dtype),
            *map(_extension.strided, (grad, query, key, value, slot_mask)),
            *map(_extension.address, (output, rounding, log_sum_exp, statistics, carry, grad_query, *sums)),
            B,
            H,
            L,
            slots,
            query.shape[3],
            chunk,
            scale,
            scale * LOG2_E,
            torch._C._cuda_getCurrentRawStream(query.device.index),
        )
    if chunks > 1:
        add_chunks = sum_partials(chunks, grad_key.numel(), key.dtype, key.device)
        add_chunks(sums[0], grad_key)
        add_chunks(sums[1], grad_value)
    return tuple(without_padding(t, D) for t in (grad_query, grad_key, grad_value))
