"""Checks of what callers pass, all in one form: `<op>: <argument> must <rule>, got <value>`."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EPS_RANGE = (2.0**-126, 2.0**126)  # of kernels: so that eps and 1 / eps are normal float32 numbers

MOST_KNOWN = 4096  # calls that a check remembers


def once(check: Callable[..., None]) -> Callable[..., None]:
    """Leaves out a check of arguments that differ from ones that passed in the data of their tensors alone: it takes
    a third of the host time of a call. What is traced, or is no plain tensor, is always checked."""
    passed = set()

    @functools.wraps(check)
    def run(*arguments: object) -> None:
        if torch.compiler.is_compiling():
            return check(*arguments)
        alike = []
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor or kind is torch.nn.Parameter:
                alike += argument.shape, argument.dtype, argument.device
            elif argument is None or kind is float or kind is int:
                alike.append(argument)
            else:
                return check(*arguments)
        alike = tuple(alike)
        if alike not in passed:
            check(*arguments)
            if len(passed) >= MOST_KNOWN:
                passed.clear()
            passed.add(alike)

    return run


def fail(op: str, argument: str, rule: str, got: object, error: type[Exception] = ValueError) -> None:
    raise error(f"{op}: {argument} must {rule}, got {got}")


def tensor(op: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            fail(op, name, "be a tensor", type(value).__name__, TypeError)


def shape(op: str, layout: str, expected: tuple[int, ...], **arguments: Tensor) -> None:
    """`layout` names the dimensions ("[B, H, M, D]"), `expected` their sizes; -1 accepts any size."""
    for name, value in arguments.items():
        if value.shape != expected and not _agrees(value.shape, expected):
            sizes = "" if all(size == -1 for size in expected) else f" = {_sizes(expected)}"
            fail(op, name, f"have shape {layout}{sizes}", list(value.shape))


def floating(op: str, **arguments: Tensor) -> None:
    for name, value in arguments.items():
        if value.dtype not in FLOATING:
            fail(op, name, "be float16, bfloat16, float32 or float64", value.dtype, TypeError)


def same_dtype(op: str, reference: str, **arguments: Tensor) -> None:
    dtype = arguments[reference].dtype
    for name, value in arguments.items():
        if value.dtype != dtype:
            fail(op, name, f"have the dtype of {reference} ({dtype})", value.dtype, TypeError)


def carried_dtype(op: str, argument: str, value: Tensor, compute: torch.dtype) -> None:
    """What is carried from segment to segment may be wider than what is computed in."""
    if value.dtype not in (compute, torch.float32):
        fail(op, argument, f"be {compute} or torch.float32", value.dtype, TypeError)


def same_device(op: str, reference: str, **arguments: Tensor | None) -> None:
    device = arguments[reference].device
    for name, value in arguments.items():
        if value is not None and value.device != device:
            fail(op, name, f"be on the device of {reference} ({device})", value.device)


def mask(op: str, name: str, layout: str, expected: tuple[int, ...], value: object) -> None:
    if value is None:
        return
    tensor(op, **{name: value})
    if value.dtype != torch.bool:
        fail(op, name, "be a bool tensor, True where visible", value.dtype, TypeError)
    shape(op, layout, expected, **{name: value})


def positive(op: str, **arguments: object) -> None:
    for name, value in arguments.items():
        _number(op, name, value)
        if not (math.isfinite(value) and value > 0):
            fail(op, name, "be finite and above 0", value)


def at_least(op: str, smallest: float, **arguments: object) -> None:
    for name, value in arguments.items():
        _number(op, name, value)
        if not (math.isfinite(value) and value >= smallest):
            fail(op, name, f"be finite and at least {smallest}", value)


def _agrees(have: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(have) == len(expected) and all(want in (-1, size) for want, size in zip(expected, have, strict=True))


def _number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, name, "be a number", type(value).__name__, TypeError)


def _sizes(expected: tuple[int, ...]) -> str:
    return "[" + ", ".join("any" if size == -1 else str(size) for size in expected) + "]"


def unsupported_eps(eps: float) -> str | None:
    """Why kernels cannot take this eps; None when they can."""
    return None if EPS_RANGE[0] <= eps <= EPS_RANGE[1] else f"eps must be from 2**-126 to 2**126, got {eps}"
