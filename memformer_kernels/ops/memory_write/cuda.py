"""`memory_write` whose backward goes over the tokens in CUDA C++ on Hopper; all else is Triton's.
`csrc/include/memformer_kernels/memory_write_backward.cuh` has the kernel.
"""

import torch
from torch import Tensor

from memformer_kernels import _extension, launch, tiles
from memformer_kernels.ops.memory_read.cuda import DTYPES, chunk_alone, in_vectors, unsupported_device
from memformer_kernels.ops.memory_write import triton
from memformer_kernels.ops.memory_write.triton import forward  # noqa: F401
from memformer_kernels.ops.per_head import as_new_per_head, new_per_head
from memformer_kernels.partials import sum_partials
from memformer_kernels.triton_helpers import LOG2_E

LEAST_SLOTS = 65  # for fewer, Triton's kernel is ahead
CHUNK, WIDE_CHUNK = 512, 1024  # tokens that a sum is over, at least: of heads up to 64 channels, and wider ones


def unsupported_reason(
    query: Tensor,
    own_key: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    scale: float,
    eps: float,
    allow_tf32: bool,
) -> str | None:
    if not query.is_cuda:
        return f"query must be on a CUDA device, got {query.device}"
    if query.dtype not in DTYPES:
        return f"query must be float16 or bfloat16, got {query.dtype}"
    call = query, own_key, slots, key, value, bias, token_mask, scale, eps, allow_tf32
    if (reason := triton.unsupported_reason(*call)) is not None:
        return reason
    if (reason := _extension.why_not()) is not None:
        return reason
    most, channels = _extension.load().memory_write_backward_slots, _extension.load().memory_read_max_channels
    if not LEAST_SLOTS <= query.shape[2] <= most:
        return f"query must have {LEAST_SLOTS} to {most} slots, got {query.shape[2]}"
    if query.shape[3] > channels:
        return f"query must have at most {channels} channels a head, got {query.shape[3]}"
    return unsupported_device(query.device.index)


def _chunk(tokens: int, channels: int) -> int:
    return chunk_alone(tokens, CHUNK if channels <= 64 else WIDE_CHUNK)


@launch.planned
def _plan(
    shape, parts, grad_strides, query_strides, own_key_strides, slots_strides, bias_strides, dtypes, device, *options
):
    scale, eps = options
    groups, rows = triton.rows_stage(shape, grad_strides, query_strides, slots_strides, bias_strides, scale, eps)
    return groups, rows, triton.finish_stage(shape, own_key_strides, scale, scale, parts, parts)


def _over_tokens(
    query: Tensor,
    du: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    log_sum_exp: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part in CUDA C++: `ds key` of each chunk of tokens, [chunks, B, M, H, D] in float32, and the gradients of key
    and value."""
    (B, H, M, D), tokens = query.shape, key.shape[2]
    given = [in_vectors(t) for t in (query, du, key, value)]
    channels, chunk = given[0].shape[3], _chunk(tokens, D)
    partial = query.new_empty((-(-tokens // chunk), B, M, H, channels), dtype=torch.float32)
    grad_key, grad_value = (new_per_head(t, tokens) for t in given[2:])
    extension = _extension.load()
    with _extension.on_device(query.device):
        extension.memory_write_backward(
            getattr(extension, DTYPES[query.dtype]),
            *map(_extension.strided, (*given, token_mask)),
            *map(_extension.address, (log_sum_exp, delta, partial, grad_key, grad_value)),
            B,
            H,
            tokens,
            M,
            channels,
            chunk,
            scale,
            scale * LOG2_E,
            tiles.multiprocessors(query.device),
            torch._C._cuda_getCurrentRawStream(query.device.index),
        )
    if channels == D:
        return partial, grad_key, grad_value
    return partial[..., :D].contiguous(), *(as_new_per_head(t[..., :D]) for t in (grad_key, grad_value))


def backward(
    grad: Tensor,
    query: Tensor,
    own_key: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    attended: Tensor,
    log_sum_exp: Tensor,
    own_weight: Tensor,
    inv_norm: Tensor,
    scale: float,
    eps: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, own_key, slots, key, value and bias (None when there is none)."""
    (B, H, M, D), tokens = query.shape, key.shape[2]
    if slots.numel() == 0 or tokens == 0:
        saved = attended, log_sum_exp, own_weight, inv_norm
        return triton.backward(
            grad, query, own_key, slots, key, value, bias, token_mask, *saved, scale, eps, allow_tf32
        )
    parts = -(-tokens // _chunk(tokens, D))
    strides = grad.stride(), query.stride(), own_key.stride(), slots.stride(), None if bias is None else bias.stride()
    dtypes = query.dtype, slots.dtype, None if bias is None else bias.dtype
    groups, rows, finish = _plan(query.shape, parts, *strides, dtypes, query.device, scale, eps)

    def new(*sizes: int) -> Tensor:
        return slots.new_empty(sizes, dtype=torch.float32)

    grad_query, grad_own_key = new_per_head(query, M), new_per_head(query, M)
    grad_slots = slots.new_empty(slots.shape)
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    partial_bias = grad_bias if groups == 1 or bias is None else new(groups, M, H * D)
    du, row_terms = query.new_empty((B, M, H, D)), new(2, B, H, M)  # delta and the own logit's gradient
    results = du, row_terms, grad_own_key, grad_slots, partial_bias
    rows(grad, query, slots, bias, attended, own_weight, inv_norm, *results)
    if bias is not None and groups > 1:
        sum_partials(groups, M * H * D, bias.dtype, bias.device)(partial_bias, grad_bias)
    given = query, du.transpose(1, 2), key, value, token_mask, log_sum_exp
    partial, grad_key, grad_value = _over_tokens(*given, row_terms[0], scale)
    finish(partial, own_key, row_terms, grad_query)
    return grad_query, grad_own_key, grad_slots, grad_key, grad_value, grad_bias
