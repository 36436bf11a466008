"""Hostile layouts: the same values in other places, among what must never be read."""

import torch


def _unreadable(tensor, shape):
    """NaN; of integers the largest; for a mask the opposite of what it begins with."""
    if tensor.dtype == torch.bool:
        return tensor.new_full(shape, not tensor.flatten()[:1].all())
    nowhere = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return tensor.new_full(shape, nowhere)


def contiguous(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def transposed(tensor):
    return contiguous(tensor.mT).mT


def gaps(tensor):
    base = _unreadable(tensor, (*tensor.shape[:-1], 2 * tensor.shape[-1]))
    base[..., ::2] = tensor
    return base[..., ::2]


def margins(tensor):
    base = _unreadable(tensor, [size + 2 for size in tensor.shape])
    inside = base[(slice(1, -1),) * tensor.dim()]
    inside.copy_(tensor)
    return inside


def expanded(tensor):
    """Every entry of the first dimension is its first one, in the same memory."""
    return contiguous(tensor[:1]).expand(tensor.shape)


def odd_offset(tensor):
    base = _unreadable(tensor, (tensor.numel() + 1,))
    base[1:] = tensor.flatten()
    return base[1:].view(tensor.shape)


LAYOUTS = (transposed, gaps, margins, expanded, odd_offset)
