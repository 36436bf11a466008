"""Sums of parameters' gradients over the calls of a rollout."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from memformer_kernels.gradient_sink import Gradients, Make, open_sink


class Totals:
    """A sum for each parameter of a part: in float32 at least, in the order the gradients come."""

    def __init__(self, sums: Mapping[Tensor, Tensor] | None = None):
        self._sums = dict(sums or {})
        self._owned = set(self._sums)  # the others may be autograd's
        self._lent: Mapping[Tensor, Tensor] = {}
        self._parameter_of: Mapping[Tensor, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether a gradient came."""
        return bool(self._lent or self._sums)

    @contextlib.contextmanager
    def taking(self, parameters: Sequence[Tensor], leaves: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the gradients of `leaves`, which stand for `parameters`, come here, each at once, so that those of
        one call never stand beside the sums all together. The user's hooks, which belong to the rollout's one gradient,
        stay out."""
        self._parameter_of = dict(zip(leaves, parameters, strict=True))
        with hooks_replaced(leaves, [functools.partial(self._take, p) for p in parameters]), open_sink(self):
            yield

    def takes(self, parameter: Tensor) -> bool:
        """As a sink for what is delivered inside `taking`, in any thread: by other models too."""
        return parameter in self._parameter_of

    def add(self, parameters: Sequence[Tensor | None], make: Make) -> Gradients:
        of = (None if p is None else self._parameter_of.get(p) for p in parameters)
        return make([None if p is None else self._total(p) for p in of])

    def lend(self, sums: Mapping[Tensor, Tensor]) -> None:
        """Adds sums that somebody will overwrite after the next `own()`."""
        if self._sums:
            for parameter, total in sums.items():
                self._total(parameter).add_(total)
        else:
            self._lent = sums

    def own(self) -> None:
        """Copies what was lent, and what may be autograd's."""
        if self._lent:
            self._sums = {parameter: total.clone() for parameter, total in self._lent.items()}
            self._owned, self._lent = set(self._sums), {}
        for parameter in self._sums:
            self._total(parameter)

    @property
    def lent(self) -> bool:
        return bool(self._lent)

    def of(self, parameter: Tensor) -> Tensor | None:
        """The sum, or None where no gradient came."""
        return (self._lent or self._sums).get(parameter)

    def _take(self, parameter: Tensor, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        self._add(parameter, grad)
        return nothing_like(grad)

    def _total(self, parameter: Tensor) -> Tensor:
        """The sum so far, to be added to."""
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros_like(wide(parameter.detach()))
        elif parameter not in self._owned:
            self._sums[parameter] = self._sums[parameter].clone()
        self._owned.add(parameter)
        return self._sums[parameter]

    def _add(self, parameter: Tensor, grad: Tensor) -> None:
        if parameter not in self._sums:
            self._sums[parameter] = wide(grad)  # which autograd may own
        else:
            self._total(parameter).add_(grad)


def sums_of(parts: Sequence[Totals], parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """The sums over all parts, of the parameters that a gradient came of."""
    sums = {}
    for parameter in parameters:
        if terms := [total for part in parts if (total := part.of(parameter)) is not None]:
            sums[parameter] = functools.reduce(torch.add, terms)
    return sums


def gradients(parts: Sequence[Totals], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The sums over all parts in the parameters' dtypes, None where no gradient came."""
    sums = sums_of(parts, parameters)
    if any(part.lent for part in parts):  # copies, in one launch
        copies = {parameter: torch.empty_like(parameter) for parameter in sums}
        if copies:
            torch._foreach_copy_(list(copies.values()), list(sums.values()))
        return [copies.get(parameter) for parameter in parameters]
    return [sums[p].to(p.dtype) if p in sums else None for p in parameters]


def wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def nothing_like(grad: Tensor) -> Tensor:
    """What is left of a gradient for the caller of `autograd.grad`, who drops it: next to nothing, in its shape."""
    return grad if grad.is_sparse else _zero(grad.dtype, grad.device).expand_as(grad)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


@contextlib.contextmanager
def hooks_replaced(leaves: Sequence[Tensor], hooks: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Gives each leaf one gradient hook in place of the user's, which belong to the rollout's one gradient."""
    with contextlib.ExitStack() as stack:
        for leaf, hook in zip(leaves, hooks, strict=True):
            if users := leaf._backward_hooks:
                stack.callback(users.update, dict(users))
                users.clear()
            stack.callback(leaf.register_hook(hook).remove)
        yield
