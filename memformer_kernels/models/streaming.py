"""Reading texts without end: any length, in any pieces, in constant memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from memformer_kernels.models import stream_files
from memformer_kernels.models.many_segments import token_losses
from memformer_kernels.ops.precision import wide
from memformer_kernels.recording import Recording, cast_anew, dependencies_of

if TYPE_CHECKING:
    from memformer_kernels.models.recurrent import Recurrent

Result = TypeVar("Result")
Rows = Sequence[int] | Tensor | None


def stream(model: "Recurrent", batch: int = 1, *, memory: Tensor | None = None, capture: bool = True) -> "Stream":
    """Opens `batch` independent texts, to be read by a model piece by piece.

    >>> texts = stream(model.eval(), batch=2)
    >>> nats = texts.read(tokens)       # [B, n] -> [B, n]
    >>> nats = texts.read(more_tokens)  # goes on where the last call ended

    Args:
        model: a `MemformerLM` or `Memformer`, in evaluation mode if it has dropout.
        batch: B, texts side by side.
        memory: [B, M, C], what the texts begin with; the model's initial memory by default.
        capture: on a GPU, record the steps as CUDA graphs. It changes how they are launched and not what they compute.

    Raises:
        ValueError: a model that would drop out, a batch below 1, a memory of another shape.
    """
    return Stream(model, batch, memory=memory, capture=capture)


def apart(method: Callable) -> Callable:
    """Without autograd, and with tensors that may be written in any mode."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class Stream:
    """Texts that are being read; made by `stream`.

    Holds the state that the last full segments left, and the tokens of the open one of each text. Nothing in it grows,
    every tensor keeps its address, and a call allocates what it returns and a segment's work. A call of `read` takes
    one step of a whole segment for each segment that it touches: many tokens at a time are fastest.

    `memory`, [B, M, C], is the memory itself: to be looked at, where `state` copies.

    A text's results depend on its tokens alone: not on the pieces that they come in, nor on the texts beside it.

    The state has the model's dtype. What is computed follows the autocast of each call.

    The model may be trained in place, and later reads see it. Where its parameters were replaced, the steps are
    recorded anew; where they have another device or dtype, calls raise.
    """

    @apart
    def __init__(self, model: "Recurrent", batch: int, *, memory: Tensor | None = None, capture: bool = True):
        if batch < 1:
            raise ValueError(f"stream: batch must be at least 1, got {batch}")
        self.model, self.batch, self.capture = model, batch, capture
        self._length = model.config.segment_length
        self._state = {name: t.detach().clone() for name, t in model.initial_state(batch).items()}
        self.memory = self._state["memory"]
        self.device, self._dtype = self.memory.device, self.memory.dtype
        self._tokens = torch.zeros(batch, self._length, dtype=torch.long, device=self.device)
        # logits of the token after the last full segment; before the first one, all tokens are equally likely
        self._next = self.memory.new_zeros(batch, model.config.vocabulary)
        self._filled = torch.zeros(batch, dtype=torch.long)  # tokens of each open segment; on the CPU
        self._recordings: dict[str, Recording] = {}
        self._dependencies: object = None
        if memory is not None:
            self._check_shape("memory", memory, self.memory)
            self.memory.copy_(memory)
        self._follow_model()

    @apart
    def read(self, tokens: Tensor, *, logits: bool = False) -> Tensor:
        """Reads on in every text.

        Args:
            tokens: integer [B, n] of any n, on any device. Tokens on the CPU are checked to be of the vocabulary.
            logits: return those instead.

        Returns:
            The nats of each token given all before it, [B, n], in float32 (float64 for a float64 model). A text's first
            token, of which nothing is known, has log V. Or the logits of the token after each, [B, n, V].

        Raises:
            ValueError: wrong tokens, a model in training with dropout, or moved to another device or dtype.
        """
        self._follow_model()
        self._check_tokens(tokens)
        result = self._next.new_empty(*tokens.shape, *self._next.shape[1:] if logits else ())
        result = result if logits else wide(result)
        for rows, given, places, nats, step_logits in self._read_on(tokens):
            result[rows, given] = (step_logits if logits else nats)[rows, places]
        return result

    @apart
    def state(self, rows: Rows = None) -> dict[str, Tensor]:
        """A copy of all that the texts are: tensors [B, ...] by name, or of some rows.

        memory [B, M, C], with `Memformer` the encoder's states [B, L, C], logits [B, V] that the last full segment
        ended with, tokens [B, L] of the open segment and how many of them are `filled` [B], on the CPU.
        """
        index, _ = self._rows(rows)
        return {name: t[index.to(t.device)] for name, t in self._all().items()}

    @apart
    def load_state(self, state: Mapping[str, Tensor], rows: Rows = None) -> None:
        """Puts back what `state` returned, of this stream or another one of the same sizes, device and dtype aside."""
        host, _ = self._rows(rows)
        self.check_state(state, len(host))
        for name, t in self._all().items():
            t[host.to(t.device)] = state[name].to(t)
        self._left_open()

    def check_state(self, state: Mapping[str, Tensor], rows: int) -> None:
        """Raises `ValueError` unless it can be loaded into so many rows."""
        own = self._all()
        if state.keys() != own.keys():
            raise ValueError(f"stream: state must hold {', '.join(own)}, got {', '.join(state)}")
        for name, t in own.items():
            self._check_shape(f"state {name!r}", state[name], t[:1].expand(rows, *t.shape[1:]))
        filled = state["filled"]
        if len(filled) and not 0 <= int(filled.min()) <= int(filled.max()) < self._length:
            raise ValueError(f"stream: state 'filled' must be from 0 to {self._length - 1}, got {filled.tolist()}")
        tokens, vocabulary = state["tokens"], self.model.config.vocabulary
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise ValueError(f"stream: state 'tokens' must be from 0 to {vocabulary - 1}")

    @apart
    def save(
        self, path: str | Path, rows: Rows = None, *, stream_id: str | None = None, step: int | None = None
    ) -> None:
        """Writes `state(rows)` into a state file, atomically, with digests of it and of the model's weights.

        `stream_id` and `step` are kept beside it, for the caller. Raises `ValueError` for NaN or infinities.
        """
        stream_files.save_state(path, self.model, self.state(rows), stream_id=stream_id, step=step)

    @apart
    def load(self, path: str | Path, rows: Rows = None) -> dict:
        """Puts back what `save` wrote, into as many rows, and returns the file's metadata: `stream_id`, `step`, ...

        Reading goes on bit for bit. Raises `StateFileError`, and leaves all rows as they were, for a file that is
        missing, damaged, or of another model, configuration, weights, dtype or number of rows.
        """
        state, metadata = stream_files.load_state(path, self.model, self.state(rows))
        self.load_state(state, rows)
        return metadata

    @apart
    def reset(self, rows: Rows = None) -> None:
        """Begins new texts, in some rows: integers, or booleans [B]. The other rows go on as they were."""
        self._follow_model()
        host, index = self._rows(rows)
        for name, fresh in self.model.initial_state(self.batch).items():
            self._state[name][index] = fresh[index].to(self._state[name].dtype)
        self._next[index], self._tokens[index], self._filled[host] = 0, 0, 0
        self._left_open()

    def _all(self) -> dict[str, Tensor]:
        return {**self._state, "logits": self._next, "tokens": self._tokens, "filled": self._filled}

    def _read_on(self, tokens: Tensor) -> Iterator[tuple]:
        """Step after step `(rows, given, places, nats, logits)`: of these rows the tokens at `given` were read, and
        stand at `places` of the step's nats [B, L] and logits [B, L, V]. The next step overwrites those."""
        tokens = tokens.to(self.device)
        self._left_open()
        groups = self._rows_by_place()  # which are at different tokens once all are at the same place
        read = [0] * len(groups)
        while min(read) < tokens.shape[1]:
            moves = []
            for i, (host, rows, _) in enumerate(groups):
                filled = int(self._filled[host[0]])
                count = min(tokens.shape[1] - read[i], self._length - filled)
                if count:
                    given, places = slice(read[i], read[i] + count), slice(filled, filled + count)
                    self._tokens[rows, places] = tokens[rows, given]
                    moves.append((i, host, rows, given, places))
            nats, logits, state = self._play(self._read_segment)
            for i, host, rows, given, places in moves:
                if places.stop == self._length:
                    self._go_on(rows, logits, state)
                read[i], self._filled[host] = given.stop, places.stop % self._length
                yield rows, given, places, nats, logits

    def _rows_by_place(self) -> list[tuple[Tensor, slice | Tensor, int]]:
        """The rows whose open segments are equally full, as an index on the CPU and one on the device, and how full."""
        result = []
        for filled in self._filled.unique().tolist():
            host = (self._filled == filled).nonzero().flatten()
            result.append((host, slice(None) if len(host) == self.batch else host.to(self.device), filled))
        return result

    def _read_segment(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The open segments as if they were full: causal, so that what lies behind their last token does no harm."""
        logits, state = self.model.read_segment(self._tokens, self._state)
        before = torch.cat([self._next[:, None], logits[:, :-1]], 1)
        return token_losses(before, self._tokens), logits, state

    def _go_on(self, rows: slice | Tensor, logits: Tensor, state: dict[str, Tensor]) -> None:
        """To the next segment, in the rows whose segment is full."""
        for name, mine in self._state.items():
            mine[rows] = state[name][rows].to(mine.dtype)
        self._next[rows] = logits[rows, -1].to(self._next.dtype)

    def _left_open(self) -> None:
        """The open segments are no longer those that were decoded."""

    def _play(self, body: Callable[[], Result]) -> Result:
        """Calls it, or replays its graph."""
        with cast_anew():
            if not self.capture:
                return body()
            if body.__name__ not in self._recordings:
                self._recordings[body.__name__] = Recording(body, self.device, pool=self._pool)
            return self._recordings[body.__name__].replay()

    def _follow_model(self) -> None:
        """Forgets the recordings where they are no longer of the model as it is."""
        if self.model.training and self.model.config.dropout:
            raise ValueError("stream: model must be in evaluation mode, or it drops out: call model.eval()")
        now = dependencies_of(self.model)
        if now == self._dependencies:
            return
        weight = self.model.write.bias
        if (weight.device, weight.dtype) != (self.device, self._dtype):
            raise ValueError(
                f"stream: model must stay {self._dtype} on {self.device}, got {weight.dtype} on {weight.device}; "
                "open another stream and give it this one's state(): load_state converts"
            )
        self._dependencies = now
        self._forget_recordings()

    def _forget_recordings(self) -> None:
        self._recordings.clear()
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def _check_tokens(self, tokens: Tensor) -> None:
        self.model.check_tokens(tokens)
        if tokens.shape[0] != self.batch:
            raise ValueError(f"stream: tokens must have {self.batch} rows, got {tokens.shape[0]}")
        if tokens.device.type == "cpu" and tokens.numel():
            least, most = (int(t) for t in tokens.aminmax())
            if least < 0 or most >= self._next.shape[1]:
                found = least if least < 0 else most
                raise ValueError(f"stream: tokens must be from 0 to {self._next.shape[1] - 1}, got {found}")

    def _check_shape(self, what: str, given: Tensor, like: Tensor) -> None:
        if given.shape != like.shape:
            raise ValueError(f"stream: {what} must be {list(like.shape)}, got {list(given.shape)}")

    def _rows(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Chosen rows as an index on the CPU and on the device."""
        if rows is None:
            rows = range(self.batch)
        chosen = rows.cpu() if isinstance(rows, Tensor) else torch.tensor(list(rows))
        if chosen.dtype == torch.bool:
            self._check_shape("rows", chosen, self._filled)
            chosen = chosen.nonzero().flatten()
        numbers = chosen.tolist()
        if len(set(numbers)) < len(numbers) or any(not 0 <= n < self.batch for n in numbers):
            raise ValueError(f"stream: rows must be different numbers from 0 to {self.batch - 1}, got {numbers}")
        host = chosen.long()
        return host, host.to(self.device)
