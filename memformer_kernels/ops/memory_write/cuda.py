"""`memory_write` with what goes over the tokens in CUDA C++ on Hopper; all else is Triton's, and so is the backward of
few slots, and that of more slots than a block holds and many tokens. `memory_write_forward.cuh` and
`memory_write_backward.cuh` in `csrc/include/memformer_kernels` have the kernels; of more slots
`memory_read_backward.cuh`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from memformer_kernels import _extension, launch, tiles
from memformer_kernels.hopper import DTYPES, chunk_of_tokens, in_vectors, unsupported_device, without_padding
from memformer_kernels.ops.memory_read.cuda import ALONE
from memformer_kernels.ops.memory_write import triton
from memformer_kernels.ops.per_head import new_per_head
from memformer_kernels.partials import sum_partials
from memformer_kernels.triton_helpers import LOG2_E

LEAST_SLOTS = 65  # for fewer, Triton's backward is ahead,
LEAST_TOKENS = 512  # and for fewer of these its forward as fast
# Tokens that a sum is over, at least: of heads up to 64 channels, and wider ones. Forward, for a slot.
CHUNK_OF_SLOT, WIDE_CHUNK_OF_SLOT = 8, 16
CHUNK, WIDE_CHUNK = 512, 1024
ROWS = 64  # slots of a group of warps in the forward
TILE = 64  # tokens, in the backward
MOST_TOKENS_HELD = 2048  # that stay on chip in the backward of more slots than a block holds, 1024 at a time


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
    if query.shape[2] < LEAST_SLOTS and key.shape[2] < LEAST_TOKENS:
        return (
            f"there must be at least {LEAST_SLOTS} slots or {LEAST_TOKENS} tokens, got {query.shape[2]} and "
            f"{key.shape[2]}: fewer are left to Triton's kernels"
        )
    channels = _extension.load().memory_read_max_channels
    if query.shape[3] > channels:
        return f"query must have at most {channels} channels a head, got {query.shape[3]}"
    return unsupported_device(query.device.index)


def _chunk_forward(tokens: int, heads: int, slots: int, channels: int, device: torch.device) -> int:
    """Of more slots the sums are larger, and there are more tiles of slots in the place of chunks; no more of them than
    keep the GPU busy with the heads of a batch of one.
    """
    tile = _extension.load().memory_write_forward_tokens
    rows = -(-slots // ROWS) * ROWS
    least = rows * (CHUNK_OF_SLOT if channels <= 64 else WIDE_CHUNK_OF_SLOT)
    if slots <= ROWS:  # memory is the bound, and sums are an eighth of its traffic then
        least = max(least, slots * WIDE_CHUNK_OF_SLOT)
    return chunk_of_tokens(tokens, least, tile, tiles.multiprocessors(device) // heads)


def _chunk(tokens: int, channels: int) -> int:
    return chunk_of_tokens(tokens, CHUNK if channels <= 64 else WIDE_CHUNK, TILE)


@launch.planned
def _forward_plan(shape, tokens, bias_strides, dtypes, device, scale, eps, save):
    """`(chunk, partial results, launcher of what brings heads and them together)`."""
    chunk = _chunk_forward(tokens, *shape[1:], device)
    parts = -(-tokens // chunk)
    return chunk, parts, triton.combine_stage(shape, bias_strides, scale, eps, parts)


def forward(
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
    save: bool,
) -> tuple[Tensor | None, ...]:
    """What Triton's returns, but for the last bits."""
    (B, H, M, D), tokens = query.shape, key.shape[2]
    if tokens == 0 or D % 8 or slots.numel() == 0:
        return triton.forward(query, own_key, slots, key, value, bias, token_mask, scale, eps, allow_tf32, save)
    bias_strides = None if bias is None else bias.stride()
    dtypes = query.dtype, slots.dtype, None if bias is None else bias.dtype
    options = scale, eps, save
    chunk, parts, combine = _forward_plan(query.shape, tokens, bias_strides, dtypes, query.device, *options)
    given = [in_vectors(t) for t in (query, own_key, slots.view(B, M, H, D).transpose(1, 2), key, value)]
    extension = _extension.load()

    def attend(acc: Tensor, statistics: Tensor) -> None:
        top, step = statistics.data_ptr(), parts * B * H * M * statistics.element_size()  # views would take longer
        with _extension.on_device(query.device):
            extension.memory_write_forward(
                _extension.dtype(query.dtype),
                _extension.dtype(slots.dtype),
                *map(_extension.strided, (*given, token_mask)),
                acc.data_ptr(),
                top,
                top + step,
                top + 2 * step,
                B,
                H,
                tokens,
                M,
                D,
                chunk,
                scale * LOG2_E,
                tiles.multiprocessors(query.device),
                torch._C._cuda_getCurrentRawStream(query.device.index),
            )

    return triton.in_parts(query, slots, bias, save, parts, attend, combine)


@launch.planned
def _plan(
    shape, parts, grad_strides, query_strides, own_key_strides, slots_strides, bias_strides, dtypes, device, *options
):
    scale, eps = options
    groups, rows = triton.rows_stage(
        shape, grad_strides, query_strides, slots_strides, bias_strides, dtypes, scale, eps
    )
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
            _extension.dtype(query.dtype),
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
    grads = without_padding(grad_key, D), without_padding(grad_value, D)
    return partial if channels == D else partial[..., :D].contiguous(), *grads


def _over_tokens_held(
    query: Tensor,
    du: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    log_sum_exp: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_over_tokens`, of more slots than a block holds, by the kernel of `memory_read`, in which the tokens stay on
    chip and the slots stream past."""
    (B, H, M, D), tokens = query.shape, key.shape[2]
    extension = _extension.load()
    given = [in_vectors(t) for t in (du, query, key, value)]
    channels, tile = given[0].shape[3], extension.memory_read_backward_tokens
    padding = (0, -M % tile)
    log_sum_exp, delta = functional.pad(log_sum_exp, padding, value=torch.inf), functional.pad(delta, padding)
    statistics = torch.cat([t.view(B, H, -1, 1, tile) for t in (log_sum_exp, delta)], 3)
    partial = query.new_empty((1, B, M, H, channels), dtype=torch.float32)
    grad_key, grad_value = (new_per_head(t, tokens) for t in given[2:])
    with _extension.on_device(query.device):
        extension.memory_read_backward(
            _extension.dtype(query.dtype),
            *map(_extension.strided, (*given, token_mask)),
            *map(_extension.address, (None, None, None, statistics, partial, None, grad_key, grad_value)),
            B,
            H,
            M,
            tokens,
            channels,
            M + padding[1],
            scale,
            scale * LOG2_E,
            torch._C._cuda_getCurrentRawStream(query.device.index),
        )
    grads = without_padding(grad_key, D), without_padding(grad_value, D)
    return partial if channels == D else partial[..., :D].contiguous(), *grads


def _way_over_tokens(slots: int, tokens: int, channels: int) -> tuple[Callable | None, int]:
    """`(the function that goes over the tokens, partial results)`; None where Triton's kernels do."""
    if slots < LEAST_SLOTS:
        return None, 0
    if tokens and slots <= _extension.load().memory_write_backward_slots:
        return _over_tokens, -(-tokens // _chunk(tokens, channels))
    # a block of the read's that is alone would take delta from the weights, which are without the slot's own
    return (_over_tokens_held, 1) if ALONE < tokens <= MOST_TOKENS_HELD else (None, 0)


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
    inv_total: Tensor,
    log_sum_exp: Tensor,
    own_weight: Tensor,
    inv_norm: Tensor,
    scale: float,
    eps: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, own_key, slots, key, value and bias (None when there is none)."""
    (B, H, M, D), tokens = query.shape, key.shape[2]
    over_tokens, parts = _way_over_tokens(M, tokens, D)
    if slots.numel() == 0 or over_tokens is None:
        saved = attended, inv_total, log_sum_exp, own_weight, inv_norm
        return triton.backward(
            grad, query, own_key, slots, key, value, bias, token_mask, *saved, scale, eps, allow_tf32
        )
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
    saved = [tensor.contiguous() for tensor in (attended, inv_total, own_weight, inv_norm)]
    rows(grad, query, slots, bias, *saved, *results)
    if bias is not None and groups > 1:
        sum_partials(groups, M * H * D, bias.dtype, bias.device)(partial_bias, grad_bias)
    given = query, du.transpose(1, 2), key, value, token_mask, log_sum_exp.contiguous()
    partial, grad_key, grad_value = over_tokens(*given, row_terms[0], scale)
    finish(partial, own_key, row_terms, grad_query)
    return grad_query, grad_own_key, grad_slots, grad_key, grad_value, grad_bias
