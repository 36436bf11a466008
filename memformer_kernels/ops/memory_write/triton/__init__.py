"""`memory_write` in Triton: its limits, its plans, its buffers. The mathematics stands beside the kernels."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from memformer_kernels import checks, launch, tiles
from memformer_kernels.ops.memory_write.triton.backward import (
    _memory_write_backward_query_kernel,
    _memory_write_backward_resident_kernel,
    _memory_write_backward_rows_kernel,
)
from memformer_kernels.ops.memory_write.triton.forward import (
    _memory_write_forward_attend_kernel,
    _memory_write_forward_combine_kernel,
)
from memformer_kernels.ops.per_head import new_per_head
from memformer_kernels.partials import sum_partials
from memformer_kernels.triton_attention import attention_backward_keys_kernel, attention_backward_rows_kernel
from memformer_kernels.triton_helpers import LOG2_E

MOST_CHANNELS = 16384  # of a slot, all heads in registers of one program

# Groups of chunks that are enough programs, for a multiprocessor. On an H200, 4 rows of 4096 tokens by 128 slots, in
# groups (0.97) and in chunks: forward 41 and 47 us, backward 124 and 112 us
GROUPS_FORWARD, GROUPS_BACKWARD = 0.5, 1.0


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
    reason = (
        launch.unsupported_reason(query=query)
        or launch.unsupported_width("query", query.shape[-1])
        or launch.unsupported_scale(scale)
        or checks.unsupported_eps(eps)
    )
    if reason is None and slots.shape[-1] > MOST_CHANNELS:
        return f"slots must have at most {MOST_CHANNELS} channels, got {slots.shape[-1]}"
    return reason


def _split(tokens: int, chunk: int, group: int, programs: int, device: torch.device, least: float) -> tuple[int, int]:
    """`(chunks that a program takes, partial results)`, where there would be so many programs of all tokens."""
    at_once = tiles.chunks_at_once(group, programs * -(-tokens // (chunk * group)), device, least)
    return at_once, -(-tokens // (chunk * at_once))


@launch.planned
def _forward_plan(
    shape,
    tokens,
    query_strides,
    own_key_strides,
    slots_strides,
    key_strides,
    value_strides,
    bias_strides,
    mask_strides,
    dtypes,
    device,
    scale,
    eps,
    allow_tf32,
    save,
):
    """`(partial results, launcher of the attention, launcher of what brings heads and them together)`."""
    B, H, M, D = shape
    itemsize, block_d = dtypes[0].itemsize, tiles.head_block(D)
    block_m = tiles.slot_tile(M, itemsize, block_d, device)
    config = tiles.config("memory_write_forward_attend", device, itemsize, block_d, block_m)
    chunk, group = tiles.grouped_chunks(tokens, block_m, block_d, device)
    at_once, parts = _split(tokens, chunk, group, -(-M // block_m) * B * H, device, GROUPS_FORWARD)
    parts = max(1, parts)
    if group > 1 and config["num_warps"] == 8:
        config["maxnreg"] = 128  # two programs a multiprocessor, with the second sum too
    strides = query_strides, own_key_strides, slots_strides, key_strides, value_strides, mask_strides or (0, 0)
    attend = launch.Launcher(
        _memory_write_forward_attend_kernel,
        -(-M // block_m) * parts * B * H,
        (*strides, scale * LOG2_E, tokens, M, H, chunk, at_once, B * M * H),
        D=D,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        ALL_TOKENS=mask_strides is None and tokens % config["BLOCK_L"] == 0,
        GROUPED=group > 1,
        PRECISION="tf32" if allow_tf32 else "ieee",
        **config,
    )
    return parts, attend, combine_stage(shape, bias_strides, scale, eps, parts, group // at_once, group > 1)


def combine_stage(shape, bias_strides, scale, eps, parts, group=1, grouped=False) -> launch.Launcher:
    """What brings partial results, groups of which are merged first, and the heads of a slot together."""
    B, H, M, D = shape
    return launch.Launcher(
        _memory_write_forward_combine_kernel,
        B * M,
        (bias_strides or (0, 0), scale * LOG2_E, eps, 1 / eps, M, H, parts, group, B * M * H),
        D=D,
        ONE_PART=parts == 1,
        GROUPED=grouped,
        **tiles.heads_row(H, D, 4),
    )


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
    """`(output, attended, inv_total, log_sum_exp, own_weight, inv_norm)`; all but the output in float32, None unless
    `save`. The log-sum-exp is that of the scaled logits, over the scale; u is `attended * inv_total`.
    """
    strides = query.stride(), own_key.stride(), slots.stride(), key.stride(), value.stride()
    dtypes = query.dtype, slots.dtype, None if bias is None else bias.dtype
    options = scale, eps, allow_tf32, save
    parts, attend, combine = _forward_plan(
        query.shape,
        key.shape[2],
        *strides,
        launch.strides(bias),
        launch.strides(token_mask),
        dtypes,
        query.device,
        *options,
    )
    attention = functools.partial(attend, query, own_key, slots, key, value, token_mask)
    return in_parts(query, slots, bias, save, parts, attention, combine)


def in_parts(
    query: Tensor, slots: Tensor, bias: Tensor | None, save: bool, parts: int, attend: Callable, combine: Callable
) -> tuple[Tensor | None, ...]:
    """What `forward` returns, by `attend(acc, statistics)`, which fills in partial results, and `combine`."""
    B, H, M, D = query.shape

    def new(*sizes: int) -> Tensor:
        return slots.new_empty(sizes, dtype=torch.float32)

    output = slots.new_empty(slots.shape)
    attended = new(B, M, H * D) if save or parts == 1 else None
    acc = attended if parts == 1 else new(parts, B, M, H * D)
    per_slot = (new(B, H, M), new(B, H, M), new(B, H, M), new(B, M)) if save else (None,) * 4
    if output.numel() > 0:
        statistics = new(2 * parts + 1, B, H, M)
        attend(acc, statistics)
        combine(acc, statistics, bias, output, attended if save else None, *per_slot)
    return output, attended if save else None, *per_slot


def rows_stage(shape, grad_strides, query_strides, slots_strides, bias_strides, dtypes, scale, eps):
    """What of the backward belongs to a slot: `(groups of the batch, launcher)`."""
    B, H, M, D = shape
    groups, group = tiles.batch_groups(B)
    strides = grad_strides, query_strides, slots_strides, bias_strides or (0, 0)
    arguments = *strides, scale, 1 / eps, B, M, H, group, M * H * D
    channel_bytes = 4 + 2 * dtypes[1].itemsize + dtypes[0].itemsize  # what is attended to, gradient and slots, query
    config = tiles.heads_row(H, D, channel_bytes)
    return groups, launch.Launcher(_memory_write_backward_rows_kernel, groups * M, arguments, D=D, **config)


def finish_stage(shape, own_key_strides, scale, part_scale, parts, group) -> launch.Launcher:
    """The gradient of the query from its parts, so many of them a group."""
    B, H, M, D = shape
    arguments = own_key_strides, scale, part_scale, M, H, parts, group, B * M * H
    config = tiles.heads_row(H, D, 4)
    return launch.Launcher(_memory_write_backward_query_kernel, B * M, arguments, D=D, **config)


@launch.planned
def _backward_plan(
    shape,
    tokens,
    grad_strides,
    query_strides,
    own_key_strides,
    slots_strides,
    key_strides,
    value_strides,
    bias_strides,
    mask_strides,
    dtypes,
    device,
    scale,
    eps,
    allow_tf32,
):
    """`(groups of the batch, partial gradients of the query, launchers by stage)`."""
    B, H, M, D = shape
    itemsize, block_d = dtypes[0].itemsize, tiles.head_block(D)
    block_m = tiles.slot_tile(M, itemsize, block_d, device)
    groups, rows = rows_stage(shape, grad_strides, query_strides, slots_strides, bias_strides, dtypes, scale, eps)
    stages = {"rows": rows}
    strides = key_strides, value_strides, mask_strides or (0, 0)
    scales = scale * LOG2_E, scale
    constants = {"D": D, "BLOCK_D": block_d, "PRECISION": "tf32" if allow_tf32 else "ieee"}
    several_tiles = block_m < M
    if several_tiles:
        chunk, group, at_once = tiles.token_chunk(tokens, block_m), 1, 1
        parts = -(-tokens // chunk)
        du_strides = M * H * D, D, H * D, 1
        config = tiles.config("attention_backward_rows", device, itemsize, block_d)
        stages["query"] = launch.Launcher(
            attention_backward_rows_kernel,
            -(-M // config["BLOCK_ROWS"]) * parts * B * H,
            (du_strides, (0, 0, 0, 0), query_strides, *strides, *scales, M, tokens, H, chunk, B * M * H),
            ALL_KEYS=mask_strides is None and tokens % config["BLOCK_KEYS"] == 0,
            **constants,
            **config,
        )
        config = tiles.config("attention_backward_keys", device, itemsize, block_d)
        stages["tokens"] = launch.Launcher(
            attention_backward_keys_kernel,
            -(-tokens // config["BLOCK_KEYS"]) * B * H,
            (du_strides, query_strides, *strides, *scales, M, tokens, H, M, 0),
            ALL_KEYS=mask_strides is None and tokens % config["BLOCK_KEYS"] == 0,
            **constants,
            **config,
        )
    else:
        chunk, group = tiles.grouped_chunks(tokens, block_m, block_d, device)
        at_once, parts = _split(tokens, chunk, group, B * H, device, GROUPS_BACKWARD)
        config = tiles.config("memory_write_backward_resident", device, itemsize, block_d, block_m)
        stages["resident"] = launch.Launcher(
            _memory_write_backward_resident_kernel,
            parts * B * H,
            (query_strides, own_key_strides, *strides, *scales, tokens, M, H, chunk, at_once, B * M * H),
            BLOCK_M=block_m,
            ALL_TOKENS=mask_strides is None and tokens % config["BLOCK_L"] == 0,
            WIDE=block_m < 64 <= block_d,
            GROUPED=group > 1,
            ONE_CHUNK=tokens <= chunk,
            **constants,
            **config,
        )
    if several_tiles or not 0 < tokens <= chunk:
        part_scale = 1.0 if several_tiles else scale
        stages["finish"] = finish_stage(shape, own_key_strides, scale, part_scale, parts, group // at_once)
    return groups, parts, stages


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
    shape, tokens = query.shape, key.shape[2]
    B, H, M, D = shape
    grad_query, grad_own_key = new_per_head(query, M), new_per_head(query, M)
    grad_key, grad_value = new_per_head(key, tokens), new_per_head(key, tokens)
    grad_slots = slots.new_empty(slots.shape)
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    if grad_slots.numel() == 0:
        grad_bias = None if bias is None else grad_bias.zero_()
        return grad_query, grad_own_key, grad_slots, grad_key.zero_(), grad_value.zero_(), grad_bias
    strides = grad.stride(), query.stride(), own_key.stride(), slots.stride(), key.stride(), value.stride()
    dtypes = query.dtype, slots.dtype, None if bias is None else bias.dtype
    options = scale, eps, allow_tf32
    groups, parts, run = _backward_plan(
        shape, tokens, *strides, launch.strides(bias), launch.strides(token_mask), dtypes, query.device, *options
    )

    def new(*sizes: int) -> Tensor:
        return slots.new_empty(sizes, dtype=torch.float32)

    partial_bias = grad_bias if groups == 1 or bias is None else new(groups, M, H * D)
    partial_query = new(parts, B, M, H, D) if "finish" in run else grad_query
    grad_attended = query.new_empty((B, M, H, D))
    row_terms = new(2, B, H, M)  # delta and the own logit's gradient
    results = grad_attended, row_terms, grad_own_key, grad_slots, partial_bias
    saved = [tensor.contiguous() for tensor in (attended, inv_total, own_weight, inv_norm)]
    run["rows"](grad, query, slots, bias, *saved, *results)
    if bias is not None and groups > 1:
        sum_partials(groups, M * H * D, bias.dtype, bias.device)(partial_bias, grad_bias)
    log_sum_exp = log_sum_exp.contiguous()
    if tokens and "resident" in run:
        tensors = grad_attended, query, own_key, key, value, token_mask, log_sum_exp, row_terms
        run["resident"](*tensors, partial_query, grad_key, grad_value)
    elif tokens:
        tensors = query, key, value, token_mask, log_sum_exp, row_terms
        run["query"](grad_attended, None, None, *tensors, partial_query)
        run["tokens"](grad_attended, *tensors, grad_key, grad_value)
    if "finish" in run:
        run["finish"](partial_query, own_key, row_terms, grad_query)
    return grad_query, grad_own_key, grad_slots, grad_key, grad_value, grad_bias
