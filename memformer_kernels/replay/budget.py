"""How many bytes of graphs a rollout may keep, and what they hold."""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memformer_kernels import checks


class Count:
    """Bytes that graphs hold, each storage once, without those of known tensors and parameters."""

    def __init__(self, known: Sequence[Tensor]):
        self._known = {_address(t) for t in known if t.layout == torch.strided}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}  # by address, which another may have had before

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self._held.values() if not storage.expired())

    def add(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and not isinstance(tensor, torch.nn.Parameter):
            if (address := _address(tensor)) not in self._known:
                storage = tensor.untyped_storage()
                self._held[address] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()  # an output saved as it is would keep its own graph alive


@contextlib.contextmanager
def counting(known: Sequence[Tensor]) -> Iterator[Count]:
    """Counts what graphs made in the block hold, at a call for each tensor saved."""
    count = Count(known)
    with torch.autograd.graph.saved_tensors_hooks(count.add, lambda tensor: tensor):
        yield count


LARGE_GROUP = 2**26  # bytes of graphs of segments at once: more are no faster
LARGE_GRAPH = 2**27  # bytes of a segment's graph, of work that fills a GPU: beside another it is no faster


class Keeper:
    """Keeps the graphs of the latest calls, as many as fit the budget; the backward needs them first.

    Without a budget the graph of the last call alone is kept.
    """

    def __init__(self, budget: int | None, *, count: bool):
        self.budget, self.counts = budget, count or budget is not None  # whether it asks how large graphs are
        self._kept: deque[tuple[Any, int]] = deque()
        self._bytes = self._last = 0

    def expect(self, *, passing_bytes: int | None = None) -> None:
        """Makes room for a graph as large as the last.

        Of one that is never kept it may be known how many it holds of a segment, `passing_bytes`: without a budget a
        last graph that is not large, and larger, stays beside it.
        """
        beside = passing_bytes is not None and self.budget is None and passing_bytes <= self._last <= LARGE_GRAPH
        if not beside:
            self._make_room(self._last)

    def keep(self, record: Any, size: int) -> None:
        """Keeps `record.graph`, if that is not too much."""
        self._last = size
        self._make_room(size)
        if self.budget is None or size <= self.budget:
            self._kept.append((record, size))
            self._bytes += size
        else:
            record.graph = None

    def _make_room(self, size: int) -> None:
        while self._kept and (self.budget is None or self._bytes + size > self.budget):
            oldest, its_size = self._kept.popleft()
            oldest.graph = None
            self._bytes -= its_size


def groups_of(left: int, bytes_each: int, budget: int | None) -> int:
    """Segments of the next of as few and as equal groups as the budget allows."""
    most = left if budget is None else max(1, budget // max(bytes_each, 1))
    return -(-left // -(-left // most))


def check_budget(op: str, budget: Any) -> None:
    if budget is None or isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
        return
    if isinstance(budget, float) and 0 <= budget <= 1:
        if not torch.cuda.is_available():
            checks.fail(op, "activation_budget", "be a number of bytes where there is no GPU", repr(budget))
        return
    checks.fail(op, "activation_budget", "be bytes from 0 up, or a part of free memory from 0.0 to 1.0", repr(budget))


def budget_in_bytes(given: int | float | None, devices: Sequence[torch.device]) -> int | None:
    """A budget as given to `memory_replay`: bytes, or a float, a part of the free memory of the first GPU."""
    if given is None or isinstance(given, int):
        return given
    device = next((device for device in devices if device.type == "cuda"), None)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(given * free)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
