"""Sums of parameters' gradients over the calls of a rollout."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from memformer_kernels.gradient_sink import Gradients, GradientSink, Make, open_sink


class Totals:
    """A sum for each parameter of a part: in float32 at least, in the order the gradients come."""

    def __init__(self):
        self._sums: dict[Tensor, Tensor] = {}
        self._owned: set[Tensor] = set()
        self._static: tuple[StaticTotals, Callable[[Tensor], Tensor]] | None = None

    @contextlib.contextmanager
    def taking(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the gradients of `parameters` come here, each at once, so that those of one call never stand beside
        the sums all together. The user's hooks, which belong to the rollout's one gradient, stay out."""
        with hooks_replaced(parameters, [functools.partial(self._take, p) for p in parameters]), open_sink(self):
            yield

    def takes(self, parameter: Tensor) -> bool:
        return True

    def add(self, parameters: Sequence[Tensor | None], make: Make, reads: tuple[Tensor, ...]) -> Gradients:
        """As a sink for what is delivered inside `taking`."""
        return make([self._total(p) if p is not None and p.requires_grad else None for p in parameters])

    def taking_static(self, buffers: "StaticTotals", leaf_of: Callable[[Tensor], Tensor]) -> None:
        """From here on these are the sums of `buffers`, from zero on: those of `leaf_of(parameter)`."""
        if self._static is None:
            buffers.zero()
            self._static = buffers, leaf_of

    def settle(self, parameters: Sequence[Tensor]) -> None:
        """Copies what static buffers hold of `parameters`; they are free for the next rollout."""
        if self._static is not None:
            self._sums = {p: total.clone() for p in parameters if (total := self.of(p)) is not None}
            self._owned, self._static = set(self._sums), None

    @property
    def is_static(self) -> bool:
        return self._static is not None

    def of(self, parameter: Tensor) -> Tensor | None:
        """The sum, or None where no gradient came."""
        if self._static is None:
            return self._sums.get(parameter)
        buffers, leaf_of = self._static
        return buffers.of(leaf_of(parameter))

    def scaled(self, factor: Tensor) -> "Totals":
        """The sums times a scalar tensor."""
        result = Totals()
        result._sums = {p: total * factor.to(total.dtype) for p, total in self._sums.items()}
        return result

    def _take(self, parameter: Tensor, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        self._add(parameter, wide(grad))
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
            self._sums[parameter] = grad  # which autograd may own
        else:
            self._total(parameter).add_(grad)


def gradients(parts: Sequence[Totals], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The sums over all parts in the parameters' dtypes, None where no gradient came."""
    grads: list[Tensor | None] = []
    targets, sources = [], []
    for parameter in parameters:
        terms = [(part, total) for part in parts if (total := part.of(parameter)) is not None]
        if len(terms) == 1 and terms[0][0].is_static:  # a copy, all of them in one launch
            targets.append(torch.empty_like(parameter))
            sources.append(terms[0][1])
            grads.append(targets[-1])
        else:
            total = functools.reduce(torch.add, [total for _, total in terms]) if terms else None
            grads.append(None if total is None else total.to(parameter.dtype))
    if targets:
        torch._foreach_copy_(targets, sources)
    return grads


class StaticTotals:
    """Sums in buffers that stay where they are, for recordings to add to."""

    def __init__(self, device: torch.device):
        self._sink = GradientSink(device)

    @contextlib.contextmanager
    def taking(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """As `Totals.taking`, and what is delivered to a sink comes here too."""
        with hooks_replaced(parameters, [functools.partial(self._take, p) for p in parameters]), open_sink(self._sink):
            yield
            self._sink.join()

    def reserve(self, parameters: Sequence[Tensor]) -> None:
        """Buffers of parameters that there will be gradients of."""
        for parameter in parameters:
            if parameter not in self._sink.buffers:
                self._sink.buffers[parameter] = torch.zeros_like(wide(parameter.detach()))

    def zero(self) -> None:
        if self._sink.buffers:
            torch._foreach_zero_(list(self._sink.buffers.values()))

    def of(self, leaf: Tensor) -> Tensor | None:
        """The sum, where there is a buffer for one."""
        return self._sink.buffers.get(leaf)

    def _take(self, parameter: Tensor, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        self._sink.join()  # sums are added up in one order
        self._sink.buffers[parameter] += grad
        return nothing_like(grad)


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
