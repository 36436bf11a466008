"""Sums of partial results, always added up in the same order."""

import torch

from memformer_kernels import launch
from memformer_kernels.triton_helpers import sum_partials_kernel

BLOCK = 1024  # elements of a program: eight a thread, two 16-byte accesses of float32


@launch.planned
def sum_partials(parts: int, size: int, dtype: torch.dtype, device: torch.device) -> launch.Launcher:
    """Launcher of `target = partial.sum(0)`: partial [parts, size] in float32, target in `dtype`, both contiguous."""
    return launch.Launcher(sum_partials_kernel, -(-size // BLOCK), (parts, size), BLOCK=BLOCK, num_warps=4)
