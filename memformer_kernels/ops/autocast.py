"""Autocast, applied in the public function, so that an op sees the dtype it computes in."""

import torch
from torch import Tensor


def cast_to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device, or as they are when autocast is off. float64 stays."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
