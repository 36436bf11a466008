"""What both models are to whoever reads or makes a text with them: a state that is carried from segment to segment."""

from collections.abc import Sequence

from torch import Tensor

from memformer_kernels.layers.memory import KeyValue
from memformer_kernels.layers.transformer import KeyValueCache
from memformer_kernels.models.decoding import Decoding
from memformer_kernels.models.pretrained import Pretrained

State = dict[str, Tensor]


class Recurrent(Pretrained):
    """A model with a state of fixed shapes, all that a segment leaves to the next; "memory" is part of it.

    An open segment is one of which more tokens are to come. Its tokens see one another and `contexts`, which depend on
    the state only; the state goes on when the segment is full.
    """

    def initial_state(self, batch: int) -> State:
        """The state before the first segment, [B, ...] each."""
        raise NotImplementedError

    def read_segment(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """A full segment [B, L] to the logits of the token after each, [B, L, V], and the next state."""
        raise NotImplementedError

    def contexts(self, state: State) -> list[KeyValue]:
        """What each layer attends to besides the segment, (key, value) [B, H, ., D] each."""
        raise NotImplementedError

    def read_open_segment(
        self, tokens: Tensor, contexts: Sequence[KeyValue], caches: Sequence[KeyValueCache]
    ) -> Tensor:
        """Tokens [B, n] that stand where the caches look from, one for each context, to logits [B, n, V]."""
        raise NotImplementedError

    def start(self, batch: int, memory: Tensor | None = None, *, capture: bool = True) -> Decoding:
        """The beginning of a text after `memory` [B, M, C], the initial one by default; see `Decoding`."""
        return Decoding(self, batch, memory=memory, capture=capture)

    def extend(self, tokens: Tensor, decoding: Decoding) -> Tensor:
        """Appends tokens [B, n] to the text; logits [B, n, V] of the token after each."""
        return decoding.extend(tokens)
