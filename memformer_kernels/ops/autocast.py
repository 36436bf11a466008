"""Autocast, applied in the public function, so that what follows sees the dtype it computes in, and autocast off."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def cast_to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device, or as they are when autocast is off. float64 stays."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def outside_autocast(function: Callable) -> Callable:
    """For the eager references: autocast would round their float32 products to its own dtype."""

    @functools.wraps(function)
    def run(*arguments):
        device_type = arguments[0].device.type
        if not torch.is_autocast_enabled(device_type):
            return function(*arguments)
        with torch.autocast(device_type, enabled=False):
            return function(*arguments)

    return run
