"""Gradients of parameters added up where they are made, beside the chain of gradients that everything waits for.

A backward that makes a parameter's gradient offers it to `deliver`. As a rule that returns it, for autograd. While a
sink is open, it goes to the sink instead: `GradientSink` adds it to a buffer, on a stream of its own. Of small matrices
many products fit the GPU at once, and the gradient of a weight is needed by no other.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

MOST_PENDING = 4  # deliveries that may run behind: what they read cannot be used again before
FULL = 2**22  # elements of what a delivery reads, from which on one product fills a GPU


class Sink(Protocol):
    def takes(self, parameter: Tensor) -> bool: ...

    def add(self, parameter: Tensor, make: Callable[[], Tensor], reads: tuple[Tensor, ...]) -> None:
        """Adds the gradient that `make()` computes from `reads`."""


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


def deliver(parameter: Tensor, make: Callable[[], Tensor], *reads: Tensor) -> Tensor | None:
    """The gradient that `make()` computes from `reads`, for autograd; None where a sink takes it."""
    sink = _open
    if sink is None or not sink.takes(parameter):
        return make().to(parameter.dtype)
    sink.add(parameter, make, reads)
    return None


class GradientSink:
    """Buffers for the gradients of some parameters, in float32 at least, and the stream that fills them."""

    def __init__(self, device: torch.device):
        self.buffers: dict[Tensor, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def takes(self, parameter: Tensor) -> bool:
        return parameter in self.buffers

    def add(self, parameter: Tensor, make: Callable[[], Tensor], reads: tuple[Tensor, ...]) -> None:
        if self._stream is None or max(t.numel() for t in reads) >= FULL:
            self.join()  # sums are added up in one order
            self.buffers[parameter] += make()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self.buffers[parameter] += make()
            done = self._stream.record_event()
        self._pending.append((done, reads))
        while len(self._pending) > MOST_PENDING:
            torch.cuda.current_stream().wait_event(self._pending.popleft()[0])

    def join(self) -> None:
        """The current stream waits for all deliveries."""
        if self._pending:
            torch.cuda.current_stream().wait_event(self._pending[-1][0])
            self._pending.clear()
