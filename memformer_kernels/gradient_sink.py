"""Gradients of parameters added up where they are made.

A backward that makes parameters' gradients offers them to `deliver`. As a rule that returns them, for autograd. While a
sink is open, they are added to the sink's totals instead, by the kernels that make them: no gradient is rounded or
stored before. Small ones may be put off, to be added many at a time.
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

Gradients = tuple[Tensor | None, ...]
Run = Callable[[Sequence[tuple[Tensor, ...]]], None]
Make = Callable[[list[Tensor | None]], Gradients]  # adds a gradient to its total, or returns it where that is None

MOST_PROBLEMS = 32  # at once: pointers are parameters of a kernel, which may have 4 KiB of them
MOST_BYTES = 2**26  # of tensors that wait


class Sink(Protocol):
    def takes(self, parameter: Tensor) -> bool: ...

    def add(self, parameters: Sequence[Tensor | None], make: Make) -> Gradients:
        """Has `make` add the gradients to the totals of `parameters`."""


_open: Sink | None = None
_put_off: "PutOff | None" = None
_one_at_a_time = threading.RLock()  # autograd's threads deliver, so that no thread can own the sink


class PutOff:
    """Additions to totals that wait for others like them."""

    def __init__(self):
        self._groups: dict[tuple, list[tuple[Tensor, ...]]] = defaultdict(list)
        self._totals: set[tuple] = set()
        self._bytes = 0

    def add(self, run: Run, *problem: Tensor) -> None:
        *terms, total = problem
        size = sum(t.numel() * t.element_size() for t in terms)
        place = total.device, total.data_ptr()
        if place in self._totals or self._bytes + size > MOST_BYTES:
            self.do()
        self._groups[run, len(terms[0]), terms[0].dtype, total.device].append(problem)
        self._totals.add(place)
        self._bytes += size

    def do(self) -> None:
        for (run, *_), problems in self._groups.items():
            for i in range(0, len(problems), MOST_PROBLEMS):
                run(problems[i : i + MOST_PROBLEMS])
        self._groups.clear()
        self._totals.clear()
        self._bytes = 0


@contextlib.contextmanager
def open_sink(sink: Sink) -> Iterator[None]:
    """Inside, in any thread, what is delivered goes to `sink`, where it takes it."""
    global _open, _put_off
    with _one_at_a_time:
        before, _open, _put_off = (_open, _put_off), sink, PutOff()
        try:
            yield
            _put_off.do()
        finally:
            _open, _put_off = before


def put_off(run: Run, *problem: Tensor) -> None:
    """Adds to a total of the open sink before it is closed: `run([problem, ...])` with others of as many rows, the same
    dtype and device. A problem is tensors of so many rows, and last the total."""
    _put_off.add(run, *problem)


def deliver(parameters: Sequence[Tensor | None], make: Make) -> Gradients:
    """The gradients that `make` computes, for autograd; None where a sink takes them."""
    sink = _open
    if sink is None or not any(sink.takes(p) for p in parameters if p is not None):
        grads = make([None] * len(parameters))
    else:
        grads = sink.add(parameters, make)
    return tuple(None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))
