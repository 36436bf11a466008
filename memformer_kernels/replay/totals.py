"""Sums of parameters' gradients over the calls of a rollout."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from memformer_kernels.gradient_sink import GradientSink, open_sink


class Totals:
    """A sum for each parameter: in float32 at least, in the order the gradients come."""

    def __init__(self):
        self._sums: dict[Tensor, Tensor] = {}
        self._owned: set[Tensor] = set()
        self._static: dict[StaticTotals, Callable[[Tensor], Tensor]] = {}

    @contextlib.contextmanager
    def taking(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the gradients of `parameters` come here, each at once, so that those of one call never stand beside
        the sums all together. The user's hooks, which belong to the rollout's one gradient, stay out."""
        with hooks_replaced(parameters, [functools.partial(self._take, p) for p in parameters]), open_sink(self):
            yield

    def takes(self, parameter: Tensor) -> bool:
        return True

    def add(self, parameter: Tensor, make: Callable[[], Tensor], reads: tuple[Tensor, ...]) -> None:
        """As a sink for what is delivered inside `taking`."""
        self._add(parameter, wide(make()))

    def taking_static(self, buffers: "StaticTotals", original: Callable[[Tensor], Tensor]) -> None:
        """From here to `settle` the sums of `buffers`, from zero on, belong to these: to `original(leaf)` of each."""
        if buffers not in self._static:
            buffers.zero()
            self._static[buffers] = original

    def settle(self) -> None:
        """Takes over what static buffers hold; they are free for the next rollout."""
        for buffers, original in self._static.items():
            for leaf, total in buffers.sums().items():
                self._add(original(leaf), total.clone())
                self._owned.add(original(leaf))
        self._static.clear()

    def of(self, parameter: Tensor) -> Tensor | None:
        """The sum in the parameter's dtype, or None where no gradient came."""
        total = self._sums.get(parameter)
        return None if total is None else total.to(parameter.dtype)

    def add_scaled(self, other: "Totals", factor: Tensor) -> None:
        """Adds the sums of `other`, each times a scalar tensor."""
        for parameter, total in other._sums.items():
            self._add(parameter, total * factor.to(total.dtype))
            self._owned.add(parameter)

    def _take(self, parameter: Tensor, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        self._add(parameter, wide(grad))
        return nothing_like(grad)

    def _add(self, parameter: Tensor, grad: Tensor) -> None:
        total = self._sums.get(parameter)
        if total is None:
            self._sums[parameter] = grad  # which autograd may own: copied by the first addition
        elif parameter in self._owned:
            total += grad
        else:
            self._sums[parameter] = total + grad
            self._owned.add(parameter)


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

    def sums(self) -> dict[Tensor, Tensor]:
        """Of the parameters that a recording had a gradient of."""
        return self._sink.buffers

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
