"""What the CUDA C++ kernels for Hopper share on Python's side: where they run, and which tensors TMA can copy."""

import functools

import torch
from torch import Tensor

from memformer_kernels import _extension, tiles
from memformer_kernels.compiling import constant
from memformer_kernels.ops.per_head import as_new_per_head

ARCHITECTURE = 90  # and compiled for 90a: TMA and the matrix products of warpgroups are Hopper's alone
DTYPES = torch.float16, torch.bfloat16
VECTOR = 8  # elements of 16 bytes
MOST_CHUNKS = 32


@constant  # to `torch.compile`, which looks through a cache
def unsupported_device(index: int) -> str | None:
    architecture, compiled_for = tiles.architecture(torch.device("cuda", index)), _extension.load().architectures
    if architecture != ARCHITECTURE:
        return f"the GPU must have compute capability 9.0, got {architecture / 10}"
    if "90a" not in compiled_for.split(";"):
        return (
            f"the CUDA kernels must be compiled for 90a, got {compiled_for}; memformer-kernels build --archs 90a does"
        )
    return None


def chunk_of_tokens(tokens: int, least: int, tile: int, most_chunks: int = MOST_CHUNKS) -> int:
    """Tokens that a sum is over, at least so many: whole tiles. No argument may depend on the batch, so that a row has
    the same bits in any."""
    chunks = max(1, min(most_chunks, MOST_CHUNKS))
    return -(-max(least, -(-tokens // chunks)) // tile) * tile


def in_vectors(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that TMA can copy, of rows padded with 0 to whole vectors."""
    if _has_vectors(tensor.shape, tensor.stride()) and tensor.data_ptr() % 16 == 0:
        return tensor
    return as_new_per_head(torch.nn.functional.pad(tensor, (0, -tensor.shape[3] % VECTOR)))


def without_padding(tensor: Tensor, channels: int) -> Tensor:
    """What `in_vectors` has padded, as it was."""
    return tensor if tensor.shape[3] == channels else as_new_per_head(tensor[..., :channels])


@functools.lru_cache(maxsize=4096)
def _has_vectors(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    *sizes, D = shape
    *strides, step = strides
    vectors = all(size == 1 or (s > 0 and s % VECTOR == 0) for size, s in zip(sizes, strides, strict=True))
    return vectors and step == 1 and D % VECTOR == 0
