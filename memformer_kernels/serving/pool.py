"""A pool of streams: more texts than are read at once, each behind a lease, none of which sees another."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor

from memformer_kernels.models import stream_files
from memformer_kernels.models.recurrent import Recurrent
from memformer_kernels.models.streaming import apart
from memformer_kernels.serving.ragged import RaggedStream

NULL = 0  # the slot that idle rows read, and that none writes


@dataclass(frozen=True)
class Lease:
    """The right to one text of a pool, from `open` to `close`; afterwards every call with it is refused."""

    pool: "StreamPool" = field(repr=False)
    slot: int
    generation: int


def one_at_a_time(method: Callable) -> Callable:
    """Under the pool's lock, and apart from autograd."""
    method = apart(method)

    @wraps(method)
    def locked(self: "StreamPool", *arguments, **options):
        with self._lock:
            return method(self, *arguments, **options)

    return locked


class StreamPool:
    """Keeps up to `streams` texts and reads up to `width` of them at once, whichever and by as much as each has.

    >>> pool = StreamPool(model.eval(), streams=1000, width=32)
    >>> a, b = pool.open(), pool.open()
    >>> nats_a, nats_b = pool.read([a, b], [tokens, more_tokens])  # [n], [m] -> [n], [m]
    >>> pool.save(a, "a.safetensors")
    >>> pool.close(a)
    >>> a = pool.load("a.safetensors")

    Each text has a slot of its own, and a step of `width` rows, at constant addresses and on a GPU one CUDA graph, is
    given the slots that are to be read; rows that are left over are given a null slot. What a text's results are
    depends on its tokens and on `width`: not on the texts beside it, NaN and infinities included, on its slot, nor on
    the pieces that it comes in.

    A call returns or raises, and where a `read` raises, every text is as it was. Calls from many threads are safe, and
    take turns; on a GPU they must be on one CUDA stream.

    Args:
        model: a `MemformerLM` or `Memformer`, in evaluation mode if it has dropout.
        streams: the most texts that are open at a time.
        width: the most rows of a step, `streams` at most and 32 by default; larger reads take several steps.
        capture: on a GPU, record the step as a CUDA graph.

    Raises:
        ValueError: sizes below 1, a model that would drop out.
    """

    def __init__(self, model: Recurrent, streams: int, *, width: int | None = None, capture: bool = True):
        if streams < 1:
            raise ValueError(f"StreamPool: streams must be at least 1, got {streams}")
        width = min(streams, 32) if width is None else width
        if not 1 <= width <= streams:
            raise ValueError(f"StreamPool: width must be from 1 to {streams}, the streams, got {width}")
        self.model, self.width = model, width
        self._lock = threading.RLock()
        self._rows = RaggedStream(model, width, capture=capture)
        self._slots: dict[str, Tensor] = {}
        self._generation = [0]
        self._open = [False]
        self._read = [0]
        self._free: list[int] = []
        self.grow(streams)

    @property
    def streams(self) -> int:
        """The most texts that are open at a time."""
        return len(self._open) - 1

    def __len__(self) -> int:
        """Texts that are open."""
        return sum(self._open)

    @one_at_a_time
    def open(self, state: Mapping[str, Tensor] | None = None, *, tokens_read: int = 0) -> Lease:
        """Begins a text, or goes on with one whose `state` and number of tokens an earlier lease had.

        Raises `RuntimeError` where all streams are open, `ValueError` for a state of another model.
        """
        if not self._free:
            raise RuntimeError(f"StreamPool: all {self.streams} streams are open: close one of them, or grow the pool")
        slot = self._free[-1]
        self._fill([slot], self._fresh() if state is None else state)
        self._free.pop()
        self._open[slot], self._read[slot] = True, tokens_read
        return Lease(self, slot, self._generation[slot])

    @one_at_a_time
    def close(self, lease: Lease) -> None:
        """Ends a text. Its slot goes to a later one, the lease to nobody."""
        slot = self._slot(lease)
        self._generation[slot] += 1
        self._open[slot] = False
        self._free.append(slot)

    @one_at_a_time
    def reset(self, lease: Lease) -> None:
        """Begins a new text under the same lease."""
        slot = self._slot(lease)
        self._fill([slot], self._fresh())
        self._read[slot] = 0

    @one_at_a_time
    def read(self, leases: Sequence[Lease], tokens: Sequence[Tensor], *, logits: bool = False) -> list[Tensor]:
        """Reads on in some texts, in any order.

        Args:
            leases: different ones, of texts that are open.
            tokens: for each an integer [n] of any n, its own, on any device. Checked to be of the vocabulary, which
                for tokens on a GPU waits for them.
            logits: return those instead.

        Returns:
            For each the nats of each token given all before it, [n], in float32 (float64 for a float64 model), or the
            logits [n, V] of the token after each; as `Stream.read`.

        Raises:
            ValueError: leases that are stale, foreign or given twice; wrong tokens; a model in training with dropout,
                or moved to another device or dtype.
        """
        slots = [self._slot(lease) for lease in leases]
        if len(set(slots)) < len(slots):
            raise ValueError(f"StreamPool: leases must be different, got slots {slots}")
        self._check_tokens(tokens, len(slots))
        results, states = [], []
        for i in range(0, len(slots), self.width):
            some = slots[i : i + self.width]
            results += self._read_rows(some, tokens[i : i + self.width], logits)
            states.append((some, self._rows.state(range(len(some)))))
        for some, state in states:  # not before all is read
            self._fill(some, state)
        for slot, piece in zip(slots, tokens, strict=True):
            self._read[slot] += len(piece)
        return results

    @one_at_a_time
    def tokens_read(self, lease: Lease) -> int:
        """The length of a text so far."""
        return self._read[self._slot(lease)]

    @one_at_a_time
    def state(self, lease: Lease) -> dict[str, Tensor]:
        """A copy of all that a text is, as `Stream.state` with B = 1: for `open` of this pool or of another one."""
        return self._take([self._slot(lease)])

    @one_at_a_time
    def save(self, lease: Lease, path: str | Path, *, stream_id: str | None = None) -> None:
        """Writes a text's state into a state file, atomically, with its digests and those of the model's weights.

        All weights are read for that: to set a text aside within a process, `state` and `open` do. Raises `ValueError`
        for a state with NaN or infinities.
        """
        slot = self._slot(lease)
        step = self._read[slot]
        stream_files.save_state(path, self.model, self._take([slot]), stream_id=stream_id, step=step)

    @one_at_a_time
    def load(self, path: str | Path) -> Lease:
        """Goes on, bit for bit, with a text that `save` or `Stream.save` of one row wrote; `step` counts its tokens.

        Raises `StateFileError` for a file that is missing, damaged, or of another model, configuration, weights or
        dtype, and `RuntimeError` where all streams are open.
        """
        state, metadata = stream_files.load_state(path, self.model, self._take([NULL]))
        return self.open(state, tokens_read=metadata.get("step") or 0)

    @one_at_a_time
    def grow(self, streams: int) -> None:
        """Makes room for more texts; the ones that are open, and the step, stay as they are."""
        more = streams - self.streams
        if more < 0:
            raise ValueError(
                f"StreamPool: streams must be at least {self.streams}, as many as there are, got {streams}"
            )
        old, fresh = self._slots, self._fresh()
        self._slots = {name: torch.cat([old.get(name, t), t.expand(more, *t.shape[1:])]) for name, t in fresh.items()}
        self._free[:0] = range(streams, streams - more, -1)
        for of_slots, value in ((self._generation, 0), (self._open, False), (self._read, 0)):
            of_slots += [value] * more

    def _read_rows(self, slots: Sequence[int], tokens: Sequence[Tensor], logits: bool) -> list[Tensor]:
        """Up to `width` texts in the first rows of the step, and the null slot in the others."""
        idle = self.width - len(slots)
        self._rows.load_state(self._take([*slots, *[NULL] * idle]))
        lengths = [len(piece) for piece in tokens]
        packed = torch.cat([piece.to(self._rows.device, torch.long) for piece in tokens])
        return list(self._rows.read_packed(packed, lengths + [0] * idle, logits=logits).split(lengths))

    def _fresh(self) -> dict[str, Tensor]:
        """The state of one text before its first token."""
        self._rows.reset([0])
        return self._rows.state([0])

    def _take(self, slots: Sequence[int]) -> dict[str, Tensor]:
        return {name: t[torch.tensor(slots, device=t.device)] for name, t in self._slots.items()}

    def _fill(self, slots: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """By selection: what stood there before, NaN included, takes no part."""
        self._rows.check_state(state, len(slots))
        for name, t in self._slots.items():
            t[torch.tensor(slots, device=t.device)] = state[name].to(t)

    def _slot(self, lease: Lease) -> int:
        if not isinstance(lease, Lease):
            raise TypeError(f"StreamPool: lease must be a Lease, got {type(lease).__name__}")
        if lease.pool is not self:
            raise ValueError(f"StreamPool: lease must be of this pool, got {lease} of another")
        if not NULL < lease.slot <= self.streams:
            raise ValueError(f"StreamPool: slot must be from 1 to {self.streams}, got {lease}")
        if not self._open[lease.slot] or lease.generation != self._generation[lease.slot]:
            raise ValueError(f"StreamPool: lease must be open, got {lease}, which was closed")
        return lease.slot

    def _check_tokens(self, tokens: Sequence[Tensor], count: int) -> None:
        if len(tokens) != count:
            raise ValueError(f"StreamPool: tokens must be one tensor a lease, got {len(tokens)} for {count} leases")
        most = self.model.config.vocabulary - 1
        for i, piece in enumerate(tokens):
            if piece.dim() != 1 or piece.is_floating_point() or piece.is_complex() or piece.dtype == torch.bool:
                raise ValueError(f"StreamPool: tokens[{i}] must be integer [n], got {piece.dtype} {list(piece.shape)}")
            for found in piece.aminmax() if len(piece) else ():
                if not 0 <= found <= most:
                    raise ValueError(f"StreamPool: tokens[{i}] must be from 0 to {most}, got {int(found)}")
