"""`memory_read` in Triton: its limits, its plans, its buffers. The mathematics stands beside the kernels."""

import torch
import triton
from torch import Tensor

from memformer_kernels import launch, tiles
from memformer_kernels.ops.memory_read.triton.backward import _memory_read_backward_resident_kernel
from memformer_kernels.ops.memory_read.triton.forward import (
    _memory_read_forward_kernel,
    _memory_read_forward_resident_kernel,
)
from memformer_kernels.ops.per_head import in_per_head, new_per_head
from memformer_kernels.partials import sum_partials
from memformer_kernels.triton_attention import attention_backward_keys_kernel, attention_backward_rows_kernel
from memformer_kernels.triton_helpers import LOG2_E

try:
    from memformer_kernels.ops.memory_read.triton.hopper import _memory_read_forward_hopper_kernel
except (ImportError, AttributeError):  # Gluon is an experimental part of Triton
    _memory_read_forward_hopper_kernel = None


def unsupported_reason(
    query: Tensor, key: Tensor, value: Tensor, slot_mask: Tensor | None, scale: float, allow_tf32: bool
) -> str | None:
    return (
        launch.unsupported_reason(query=query)
        or launch.unsupported_width("query", query.shape[-1])
        or launch.unsupported_scale(scale)
    )


def saves(query: Tensor, key: Tensor) -> tuple[bool, bool]:
    """Whether the backward needs the log-sum-exp, and the output: neither where all slots fit one tile."""
    slots = key.shape[2]
    several = tiles.slot_tile(slots, query.dtype.itemsize, tiles.head_block(query.shape[-1]), query.device) < slots
    return several, several


def _hopper_tiles(slots: int, block_d: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Tiles of the kernel in Gluon, for the numbers of slots for which it is ahead; else nothing."""
    if _memory_read_forward_hopper_kernel is None or triton.knobs.runtime.interpret or dtype.itemsize != 2:
        return {}
    return tiles.measured_config("memory_read_forward_hopper", device, 2, block_d, triton.next_power_of_2(slots))


def _hopper_takes(shape, aligned: bool, *strides: tuple[int, ...]) -> bool:
    """Whether tiles can be copied 16 bytes at a time, with offsets of 32 bits inside a tile."""
    vectors = all(s[3] == 1 and all(n % 16 == 0 for n in s[:3]) and abs(s[2]) < 2**24 for s in strides)
    return aligned and vectors and shape[3] % 8 == 0 and shape[1] * shape[3] < 2**24


@launch.planned
def _forward_plan(
    shape,
    slots,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    dtype,
    device,
    scale,
    allow_tf32,
    aligned,
    save,
) -> tuple[bool, bool, launch.Launcher]:
    """`(whether the backward needs log_sum_exp and rounding, whether the kernel takes them, launcher)`."""
    B, H, L, D = shape
    block_d = tiles.head_block(D)
    block_m = tiles.slot_tile(slots, dtype.itemsize, block_d, device)
    saves = save and block_m < slots
    strides = query_strides, key_strides, value_strides, mask_strides or (0, 0)
    constants = {"D": D, "BLOCK_D": block_d}
    arguments = *strides, scale * LOG2_E, L, slots, H
    hopper = _hopper_tiles(slots, block_d, dtype, device)
    if hopper and _hopper_takes(shape, aligned, *strides[:3]):
        chunk = hopper.pop("chunk")
        while chunk > hopper["BLOCK_L"] and -(-L // chunk) * B * H < tiles.multiprocessors(device):
            chunk //= 2  # a token's result does not depend on it
        slot_tiles = -(-slots // hopper["BLOCK_M"])
        all_slots = mask_strides is None and slots % hopper["BLOCK_M"] == 0
        constants |= {"TILES": slot_tiles, "ALL_SLOTS": all_slots, **hopper}
        programs, arguments = -(-L // chunk) * B * H, (*arguments, chunk)
        return saves, True, launch.Launcher(_memory_read_forward_hopper_kernel, programs, arguments, **constants)
    constants["PRECISION"] = "tf32" if allow_tf32 else "ieee"
    if block_m < slots:
        config = tiles.config("memory_read_forward", device, dtype.itemsize, block_d)
        if hopper:  # the same tiles of slots in any layout, and so the same bits
            config |= {"BLOCK_L": 64, "BLOCK_M": hopper["BLOCK_M"]}
        programs = -(-L // config["BLOCK_L"]) * B * H
        all_slots = mask_strides is None and slots % config["BLOCK_M"] == 0
        constants["ALL_SLOTS"] = all_slots
        return saves, True, launch.Launcher(_memory_read_forward_kernel, programs, arguments, **constants, **config)
    config = tiles.config("memory_read_forward_resident", device, dtype.itemsize, block_d, block_m)
    chunk = config.pop("chunk")
    constants |= {"BLOCK_M": block_m, "ALL_SLOTS": mask_strides is None and slots == block_m}
    programs, arguments = -(-L // chunk) * B * H, (*arguments, chunk)
    run = launch.Launcher(_memory_read_forward_resident_kernel, programs, arguments, **constants, **config)
    return saves, False, run


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mask: Tensor | None,
    scale: float,
    allow_tf32: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(output, log_sum_exp, rounding)`: [B, H, L, D]; [B, H, L] in float32; [B, H, L, D]: what the rounding of the
    output took away. The last two are None without `save`, and where the backward needs none."""
    shape, slots = query.shape, key.shape[2]
    strides = query.stride(), key.stride(), value.stride(), launch.strides(slot_mask)
    aligned = (query.data_ptr() | key.data_ptr() | value.data_ptr()) % 16 == 0
    options = scale, allow_tf32, aligned, save
    saves, takes_saved, run = _forward_plan(shape, slots, *strides, query.dtype, query.device, *options)
    output, log_sum_exp, rounding = new_per_head(query, shape[2]), None, None
    if saves:
        log_sum_exp = query.new_empty(shape[:3], dtype=torch.float32)
        rounding = None if query.dtype == torch.float32 else new_per_head(query, shape[2])
    if output.numel() == 0 or slots == 0:
        return output.zero_(), log_sum_exp, rounding
    run(query, key, value, slot_mask, output, *((log_sum_exp, rounding) if takes_saved else ()))
    return output, log_sum_exp, rounding


@launch.planned
def _backward_plan(
    shape,
    slots,
    grad_strides,
    output_strides,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    dtype,
    device,
    scale,
    allow_tf32,
):
    """`(chunks of tokens, launchers)`: one that streams the tokens, or those of rows and keys."""
    B, H, L, D = shape
    block_d = tiles.head_block(D)
    block_m = tiles.slot_tile(slots, dtype.itemsize, block_d, device)
    strides = query_strides, key_strides, value_strides, mask_strides or (0, 0)
    constants = {"D": D, "BLOCK_D": block_d, "PRECISION": "tf32" if allow_tf32 else "ieee"}
    scales = scale * LOG2_E, scale
    part_rows = B * slots * H
    chunk = tiles.token_chunk(L, block_m)
    chunks = -(-L // chunk)
    if block_m < slots:
        config = tiles.config("attention_backward_rows", device, dtype.itemsize, block_d)
        rows = launch.Launcher(
            attention_backward_rows_kernel,
            -(-L // config["BLOCK_ROWS"]) * B * H,
            (grad_strides, output_strides, *strides, *scales, L, slots, H, slots, 0),
            ALL_KEYS=mask_strides is None and slots % config["BLOCK_KEYS"] == 0,
            **constants,
            **config,
        )
        config = tiles.config("attention_backward_keys", device, dtype.itemsize, block_d)
        keys = launch.Launcher(
            attention_backward_keys_kernel,
            -(-slots // config["BLOCK_KEYS"]) * chunks * B * H,
            (grad_strides, *strides, *scales, L, slots, H, chunk, part_rows),
            ALL_KEYS=mask_strides is None and slots % config["BLOCK_KEYS"] == 0,
            **constants,
            **config,
        )
        return chunks, (rows, keys)
    config = tiles.config("memory_read_backward_resident", device, dtype.itemsize, block_d, block_m)
    run = launch.Launcher(
        _memory_read_backward_resident_kernel,
        chunks * B * H,
        (grad_strides, *strides, *scales, L, slots, H, chunk, part_rows),
        BLOCK_M=block_m,
        ALL_SLOTS=mask_strides is None and slots == block_m,
        WIDE=block_m < 64 <= block_d,
        **constants,
        **config,
    )
    return chunks, (run,)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mask: Tensor | None,
    output: Tensor | None,
    log_sum_exp: Tensor | None,
    rounding: Tensor | None,
    scale: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. The sums over tokens are split by their number, never by the batch."""
    shape, slots = query.shape, key.shape[2]
    grad_query, grad_key, grad_value = new_per_head(query, shape[2]), new_per_head(key, slots), new_per_head(key, slots)
    if query.numel() == 0 or slots == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    strides = query.stride(), key.stride(), value.stride(), launch.strides(slot_mask)
    out_strides = None if output is None else output.stride()
    chunks, run = _backward_plan(
        shape, slots, grad.stride(), out_strides, *strides, query.dtype, query.device, scale, allow_tf32
    )
    partial_key, partial_value = grad_key, grad_value
    if chunks > 1:
        partial_key = key.new_empty((chunks, grad_key.numel()), dtype=torch.float32)
        partial_value = torch.empty_like(partial_key)
    if output is None:
        run[0](grad, query, key, value, slot_mask, grad_query, partial_key, partial_value)
    else:
        log_sum_exp = log_sum_exp.contiguous()
        delta = torch.empty_like(log_sum_exp)
        run[0](
            grad,
            output,
            None if query.dtype == torch.float32 else in_per_head(rounding),
            query,
            key,
            value,
            slot_mask,
            log_sum_exp,
            delta,
            grad_query,
        )
        run[1](grad, query, key, value, slot_mask, log_sum_exp, delta, partial_key, partial_value)
    if chunks > 1:
        add_chunks = sum_partials(chunks, grad_key.numel(), key.dtype, key.device)
        add_chunks(partial_key, grad_key)
        add_chunks(partial_value, grad_value)
    return grad_query, grad_key, grad_value
