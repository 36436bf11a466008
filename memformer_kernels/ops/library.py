"""How an op is registered with PyTorch: one pair of schemas, forward and backward, whatever the backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from memformer_kernels import backend
from memformer_kernels.ops.per_head import as_new_per_head

LIBRARY = torch.library.Library("memformer_kernels", "DEF")


def register_pair(op: str, forward_schema: str, backward_schema: str, fake_forward: Callable, fake_backward: Callable):
    """Defines `memformer_kernels::<op>_forward` and `_backward`; returns a function for each.

    The last argument of each schema is the backend's name; the rest goes to that backend's `forward` or `backward`.
    What these return as None, because the call needs none, the registered ops return as an empty tensor. Autograd is
    attached by the op's `autograd.Function`, not here: a classic Function costs a quarter of the host time of
    `torch.library.register_autograd`.
    """
    functions = []
    for direction, schema, fake in (
        ("forward", forward_schema, fake_forward),
        ("backward", backward_schema, fake_backward),
    ):
        name = f"{op}_{direction}"
        run = _dispatch(op, direction)
        LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _with_tensors_for_none(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"memformer_kernels::{name}", fake, lib=LIBRARY)
        functions.append(_by_the_shortest_way(getattr(torch.ops.memformer_kernels, name).default, run))
    return functions


def _dispatch(op: str, direction: str) -> Callable:
    def run(*arguments):
        *call, name = arguments
        outputs = getattr(backend.implementation(op, name), direction)(*call)
        return outputs if name != "eager" else tuple(map(_laid_out, outputs))  # as kernels and fakes make them

    return run


def _with_tensors_for_none(run: Callable) -> Callable:
    def run_registered(*arguments):
        return tuple(arguments[0].new_empty(0) if output is None else output for output in run(*arguments))

    return run_registered


def _by_the_shortest_way(overload: Callable, run: Callable) -> Callable:
    """The registered op where somebody traces or watches the call, else what it runs, without the dispatcher."""

    def call(*arguments):
        plain = type(arguments[0]) in (Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain or torch._C._len_torch_dispatch_stack():
            return overload(*arguments)
        return run(*arguments)

    return call


def _laid_out(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return as_new_per_head(tensor) if tensor.dim() == 4 else tensor.contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of one of `tensors`."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_double_backward(op: str) -> None:
    """Called first in every backward. `once_differentiable` alone drops a gradient penalty without a word."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: the fused backward has no derivative of its own (create_graph=True); "
            f'use backend="eager" where second derivatives are needed'
        )
