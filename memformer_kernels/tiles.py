"""Tiles of the Triton kernels: how much of each dimension a program takes, with how many warps and stages.

A pure function of the kernel, the architecture, the dtype, the head width and the tile of slots. Measured rows stand in
`tile_tables/sm_<architecture>.json`, written by `memformer-kernels tune`; what has no row takes a sensible one. Nothing
is tuned at run time: the order of sums never depends on a clock.
"""

import functools
import json
from importlib import resources
from pathlib import Path

import torch
import triton

from memformer_kernels import launch
from memformer_kernels.compiling import constant

# Batch rows are added up in at most this many groups: enough programs for a GPU together with the slots, and a sum over
# the groups that costs little. A constant: the order of a sum must not depend on the device.
MOST_GROUPS = 16
MOST_CHUNKS = 16
SMALL_SHARED_MEMORY = (86, 89, 120, 121)  # architectures with 99 KiB a program instead of 163 or 227
MOST_STAGES = 3  # of a loop over rows: two of them on their way, one computed
MOST_UNDER_WAY = 48 * 2**10  # bytes that a loop over rows has loaded ahead of time; any architecture has them
LEAST_CHUNK = 512  # below it a program does not outlast its own start


def head_block(width: int) -> int:
    """Channels of a head's tile: the matrix units want a multiple of 16, tiles a power of two."""
    return max(16, triton.next_power_of_2(width))


def row(channels: int) -> dict[str, int]:
    """Launch of a kernel that holds one row of channels in registers: 16 of them a thread."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK_C": block, "num_warps": min(32, max(1, block // 512))}


def heads_row(heads: int, width: int, channel_bytes: int) -> dict[str, int]:
    """The same where a row comes as [heads, width] and a loop over rows, `channel_bytes` a channel, has STAGES in hand.

    Without fused multiply-adds: rowdot(du, u) - rowdot(du, m) is exactly 0 where u = m, and what is computed does not
    depend on what else a variant of the kernel stores.
    """
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    warps = min(32, max(1, block_h * block_d // 512))
    stages = min(MOST_STAGES, 1 + MOST_UNDER_WAY // max(1, channel_bytes * block_h * block_d))
    return {"BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": warps, "enable_fp_fusion": False, "STAGES": stages}


def batch_groups(batch: int) -> tuple[int, int]:
    """`(groups, batch rows of a group)` for a sum over the batch; no group is empty."""
    group = -(-batch // MOST_GROUPS)
    return -(-batch // group), group


def slot_tile(slots: int, itemsize: int, block_d: int, device: torch.device) -> int:
    """Slots of a tile: all of them where their gradients, in float32, fit the registers of one program, and they and
    their tokens the shared memory."""
    if itemsize == 4:  # without matrix units a product is unrolled, and wants small tiles
        most = 32 if block_d <= 64 else 16
    elif architecture(device) != 90:  # 99 or 163 KiB of shared memory, or 512 columns of tensor memory
        most = 128 if block_d <= 64 else 64 if block_d <= 128 else 16
    else:
        most = 128 if block_d <= 128 else 64
    return min(most, max(16, triton.next_power_of_2(slots)))


def token_chunk(tokens: int, block_m: int) -> int:
    """Tokens of one program, of kernels that add up over tokens: their partial results, as large as the slots, then
    cost an eighth of the tokens' own traffic at most, and their sum has at most `MOST_CHUNKS` terms.

    Not a function of the batch: a row has the same bits in any batch.
    """
    chunk = max(LEAST_CHUNK, 16 * block_m, -(-tokens // MOST_CHUNKS))
    return -(-chunk // 128) * 128  # a multiple of every tile


def grouped_chunks(tokens: int, block_m: int, block_d: int, device: torch.device) -> tuple[int, int]:
    """`(tokens of a chunk, chunks of a group)` of sums over tokens that a program adds up by the group, one of about
    `token_chunk` tokens, or by the chunk. Either way the chunks of a group are added up in order, then the groups: the
    bits are the same, and only these may not depend on the batch.
    """
    group = token_chunk(tokens, block_m)
    # a second sum does not fit the registers of wider heads, nor those of other architectures
    if tokens <= group or block_d > 64 or architecture(device) != 90:
        return group, 1
    chunk = max(LEAST_CHUNK, -(-tokens // MOST_CHUNKS))
    chunk = min(-(-chunk // 128) * 128, group)
    return chunk, group // chunk


def chunks_at_once(group: int, programs: int, device: torch.device, least: float) -> int:
    """Chunks of one program: a group where that makes `programs` enough, `least` a multiprocessor, because it saves
    partial results."""
    return group if programs >= least * multiprocessors(device) else 1


def config(kernel: str, device: torch.device, itemsize: int, block_d: int, block_m: int = 0) -> dict[str, int]:
    """A new dictionary of tiles and pipeline of `kernel`: a measured row, or a sensible one.

    Args:
        itemsize: bytes of an operand of the matrix products; 4 takes the IEEE path, without matrix units.
        block_d: channels of a head's tile.
        block_m: slots of a tile, for kernels that are tuned for each; 0 for others.
    """
    measured = measured_config(kernel, device, itemsize, block_d, block_m)
    sensible = _sensible_16_bits if itemsize == 2 else _sensible_32_bits
    return measured or sensible(kernel, architecture(device), block_d, block_m)


def measured_config(kernel: str, device: torch.device, itemsize: int, block_d: int, block_m: int) -> dict[str, int]:
    """The same, but empty where there is no row: for kernels that run only where they were measured to be ahead."""
    row = row_name(itemsize, block_d, block_m)
    for table in (_user_table, _table(architecture(device))):
        if row in table.get(kernel, {}):
            return dict(table[kernel][row])
    return {}


def row_name(itemsize: int, block_d: int, block_m: int) -> str:
    """The name of a row of a table."""
    return f"{8 * itemsize} bits, D {block_d}" + (f", M {block_m}" if block_m else "")


def _sensible_16_bits(kernel: str, architecture: int, block_d: int, block_m: int) -> dict[str, int]:
    small = architecture in SMALL_SHARED_MEMORY
    narrow = block_d <= 64
    warps = 4 if narrow and block_m <= 64 else 8
    tile = 64 if block_d <= 128 else 32
    stages = 1 if small and not narrow else 2
    if kernel == "memory_read_forward_resident":
        return dict(BLOCK_L=128 if narrow else tile, chunk=512, num_warps=4, num_stages=stages)
    if kernel in ("memory_read_backward_resident", "memory_write_backward_resident"):
        return dict(BLOCK_L=tile, num_warps=warps, num_stages=stages if block_d <= 128 else 1)
    if kernel == "memory_write_forward_attend":
        return dict(BLOCK_L=tile, num_warps=warps, num_stages=stages if small or block_d > 128 else 3)
    if kernel == "memory_read_forward":
        deep = 2 if small or block_d > 128 else 3
        rows = 64 if small and not narrow else 128
        return dict(BLOCK_L=rows, BLOCK_M=tile, num_warps=4 if narrow else 8, num_stages=min(deep, stages + 1))
    if kernel == "attention_backward_rows":
        rows = 128 if narrow or block_d <= 128 and not small else 64
        return dict(BLOCK_ROWS=rows, BLOCK_KEYS=tile // 2 if small else tile, num_warps=8, num_stages=stages)
    assert kernel == "attention_backward_keys"
    keys = 2 * tile if narrow or architecture == 90 else tile
    return dict(BLOCK_ROWS=tile // 2 if small else tile, BLOCK_KEYS=keys, num_warps=8, num_stages=stages)


def _sensible_32_bits(kernel: str, architecture: int, block_d: int, block_m: int) -> dict[str, int]:
    # no matrix units: the products are unrolled multiply-adds, so tiles are small
    tile = 32 if block_d <= 64 else 16
    common = dict(num_warps=4, num_stages=1)
    if kernel == "memory_read_forward":
        return dict(BLOCK_L=tile, BLOCK_M=tile, **common)
    if kernel == "memory_read_forward_resident":
        return dict(BLOCK_L=tile, chunk=512, **common)
    if kernel.startswith("attention_backward"):
        return dict(BLOCK_ROWS=tile, BLOCK_KEYS=16, **common)
    return dict(BLOCK_L=tile, **common)


def architecture(device: torch.device) -> int:
    """10 * major + minor of the compute capability. The interpreter takes the tiles of an H100: it tests what runs."""
    return _architecture(device.index) if device.type == "cuda" else 90


@constant  # to `torch.compile`, which looks through a cache
def _architecture(device_index: int) -> int:
    return _capability(device_index)


def multiprocessors(device: torch.device) -> int:
    """Of the device; the interpreter has those of an H100."""
    return _multiprocessors(device.index) if device.type == "cuda" else 132


_user_table: dict[str, dict[str, dict[str, int]]] = {}


def load_table(path: str | Path) -> None:
    """Takes launch parameters from a file that `memformer-kernels tune` wrote, before those of the package."""
    use_rows(json.loads(Path(path).read_text())["kernels"])


def use_rows(rows: dict[str, dict[str, dict[str, int]]]) -> None:
    """Puts `rows`, by kernel and row name, before the package's own; an empty dictionary takes them away."""
    _user_table.clear()
    _user_table.update(rows)
    launch.forget_plans()


@functools.cache
def _table(architecture: int) -> dict[str, dict[str, dict[str, int]]]:
    file = resources.files("memformer_kernels") / "tile_tables" / f"sm_{architecture}.json"
    return json.loads(file.read_text())["kernels"] if file.is_file() else {}


@functools.cache
def _capability(device_index: int) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
