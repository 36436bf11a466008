"""The precision that is computed in: float32, or float64 for float64 inputs."""

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor))
