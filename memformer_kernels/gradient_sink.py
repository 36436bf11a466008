"""Gradients of parameters added up where they are made.

A backward that makes parameters' gradients offers them to `deliver`. As a rule that returns them, for autograd. While a
sink is open, they are added to the sink's totals instead, by the kernels that make them: no gradient is rounded or
stored before.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

Gradients = tuple[Tensor | None, ...]
Make = Callable[[list[Tensor | None]], Gradients]  # adds a gradient to its total, or returns it where that is None


class Sink(Protocol):
    def takes(self, parameter: Tensor) -> bool: ...

    def add(self, parameters: Sequence[Tensor | None], make: Make) -> Gradients:
        """Has `make` add the gradients to the totals of `parameters`."""


_open: Sink | None = None
_one_at_a_time = threading.RLock()  # autograd's threads deliver, so that no thread can own the sink


@contextlib.contextmanager
def open_sink(sink: Sink) -> Iterator[None]:
    """Inside, in any thread, what is delivered goes to `sink`, where it takes it."""
    global _open
    with _one_at_a_time:
        before, _open = _open, sink
        try:
            yield
        finally:
            _open = before


def deliver(parameters: Sequence[Tensor | None], make: Make) -> Gradients:
    """The gradients that `make` computes, for autograd; None where a sink takes them."""
    sink = _open
    if sink is None or not any(sink.takes(p) for p in parameters if p is not None):
        grads = make([None] * len(parameters))
    else:
        grads = sink.add(parameters, make)
    return tuple(None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))
