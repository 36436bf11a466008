"""Uninitialised memory as it may be: every new tensor full of NaN, between guard bands."""

import contextlib
from unittest import mock

import torch

BAND = 64  # elements on either side


@contextlib.contextmanager
def guarded_memory():
    """In it `torch.empty`, `torch.empty_like`, `new_empty` and `new_empty_strided` give NaN, or the largest number.

    Gives the list of `(dtype, shape)` of what was asked for. At the end the bands round each must be as they were.
    """
    made, bases = [], []

    def new(shape, strides, dtype, device):
        dtype = dtype or torch.get_default_dtype()
        junk = float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).max
        count = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        base = torch.full((count + 2 * BAND,), junk, dtype=dtype, device=device)
        made.append((dtype, tuple(shape)))
        bases.append((base, base.clone(), count))
        return base.as_strided(shape, strides, BAND)

    def sizes(args):
        return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)

    def empty(*args, dtype=None, device=None, **_):
        return new(sizes(args), _dense(sizes(args)), dtype, device)

    def empty_like(like, *, dtype=None, device=None, **_):
        return new(like.shape, _dense(like.shape), dtype or like.dtype, device or like.device)

    def new_empty(like, *args, dtype=None, device=None, **_):
        return new(sizes(args), _dense(sizes(args)), dtype or like.dtype, device or like.device)

    def new_empty_strided(like, shape, strides, dtype=None, device=None, **_):
        return new(shape, strides, dtype or like.dtype, device or like.device)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
        mock.patch.object(torch.Tensor, "new_empty_strided", new_empty_strided),
    ):
        yield made
    for (base, before, count), (dtype, shape) in zip(bases, made, strict=True):
        for band in (slice(0, BAND), slice(BAND + count, None)):
            same = torch.equal(base[band].view(torch.uint8), before[band].view(torch.uint8))
            assert same, f"written outside of a tensor {dtype} {list(shape)}"


def _dense(shape):
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)
