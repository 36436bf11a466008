"""How an op is registered with PyTorch: one pair of schemas, forward and backward, whatever the backend."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from memformer_kernels import backend
from memformer_kernels.ops.per_head import as_new_per_head

LIBRARY = torch.library.Library("memformer_kernels", "DEF")


def register_pair(op: str, forward_schema: str, backward_schema: str, fake_forward: Callable, fake_backward: Callable):
    """Defines `memformer_kernels::<op>_forward` and `_backward` and returns their overloads.

    The last argument of each schema is the backend's name; the rest goes to that backend's `forward` or `backward`.
    Autograd is attached by the op's `autograd.Function`, not here: a classic Function costs a quarter of the host
    time of `torch.library.register_autograd`.
    """
    overloads = []
    for direction, schema, fake in (
        ("forward", forward_schema, fake_forward),
        ("backward", backward_schema, fake_backward),
    ):
        name = f"{op}_{direction}"
        LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _dispatch(op, direction), "CompositeExplicitAutograd")
        torch.library.register_fake(f"memformer_kernels::{name}", fake, lib=LIBRARY)
        overloads.append(getattr(torch.ops.memformer_kernels, name).default)
    return overloads


def _dispatch(op: str, direction: str) -> Callable:
    def run(*arguments):
        *call, name = arguments
        outputs = getattr(backend.implementation(op, name), direction)(*call)
        return outputs if name != "eager" else tree_map(_laid_out, outputs)  # as kernels and fakes make them

    return run


def _laid_out(tensor: Tensor) -> Tensor:
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
