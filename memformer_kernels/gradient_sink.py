"""Gradients of parameters added up where they are made, beside the chain of gradients that everything waits for.

A backward that makes parameters' gradients offers them to `deliver`. As a rule that returns them, for autograd. While a
sink is open, they are added to the sink's totals instead, by the kernels that make them: no gradient is rounded or
stored before. `GradientSink` does so on a stream of its own: of small matrices many products fit the GPU at once, and
the gradient of a weight is needed by no other.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

MOST_PENDING = 4  # deliveries that may run behind: what they read cannot be used again before
FULL = 2**22  # elements of what a delivery reads, from which on one product fills a GPU

Gradients = tuple[Tensor | None, ...]
Make = Callable[[list[Tensor | None]], Gradients]  # adds a gradient to its total, or returns it where that is None


class Sink(Protocol):
    def takes(self, parameter: Tensor) -> bool: ...

    def add(self, parameters: Sequence[Tensor | None], make: Make, reads: tuple[Tensor, ...]) -> Gradients:
        """Has `make` add the gradients that it computes from `reads` to the totals of `parameters`."""


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


def deliver(parameters: Sequence[Tensor | None], make: Make, *reads: Tensor) -> Gradients:
    """The gradients that `make` computes from `reads`, for autograd; None where a sink takes them."""
    sink = _open
    if sink is None or not any(sink.takes(p) for p in parameters if p is not None):
        grads = make([None] * len(parameters))
    else:
        grads = sink.add(parameters, make, reads)
    return tuple(None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))


class GradientSink:
    """Buffers for the gradients of some parameters, in float32 at least, and the stream that fills them."""

    def __init__(self, device: torch.device):
        self.buffers: dict[Tensor, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def takes(self, parameter: Tensor) -> bool:
        return parameter in self.buffers

    def add(self, parameters: Sequence[Tensor | None], make: Make, reads: tuple[Tensor, ...]) -> Gradients:
        totals = [None if p is None else self.buffers.get(p) for p in parameters]
        if self._stream is None or max(t.numel() for t in reads) >= FULL:
            self.join()  # sums are added up in one order
            return make(totals)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            grads = make(totals)
            done = self._stream.record_event()
        self._pending.append((done, reads))
        if any(g is not None for g in grads):  # autograd goes on with these
            self.join()
        while len(self._pending) > MOST_PENDING:
            torch.cuda.current_stream().wait_event(self._pending.popleft()[0])
        return grads

    def join(self) -> None:
        """The current stream waits for all deliveries."""
        if self._pending:
            torch.cuda.current_stream().wait_event(self._pending[-1][0])
            self._pending.clear()
