"""`MemformerLM`: the decoder-only Memformer."""

from collections.abc import Sequence

from torch import Tensor, nn

from memformer_kernels.layers import MemoryLayer, MemoryProjection, MemoryWrite, fused
from memformer_kernels.layers.memory import KeyValue
from memformer_kernels.layers.transformer import KeyValueCache
from memformer_kernels.models.config import MemformerLMConfig
from memformer_kernels.models.initialisation import initialise
from memformer_kernels.models.many_segments import segment_losses, side_by_side, token_losses
from memformer_kernels.models.positions import positions_of
from memformer_kernels.models.recurrent import Recurrent, State
from memformer_kernels.replay import StagedCell


class MemformerLM(Recurrent):
    """Reads a text segment by segment: each token sees its segment, and the slots that all segments before wrote.

    >>> model = MemformerLM(MemformerLMConfig())
    >>> logits, memory = model(tokens)                 # [B, L] -> [B, L, V], [B, M, C]
    >>> logits, memory = model(next_tokens, memory)

    `model.cell` is a cell for `memory_replay`.
    """

    config_class = MemformerLMConfig

    def __init__(self, config: MemformerLMConfig):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.position = nn.Embedding(c.segment_length, c.width)
        self.projection = MemoryProjection(c.width, c.heads, c.layers)
        self.layers = nn.ModuleList(
            MemoryLayer(
                c.width, c.heads, c.hidden, causal=True, dropout=c.dropout, recompute=c.recompute, backend=c.backend
            )
            for _ in range(c.layers)
        )
        self.norm = nn.LayerNorm(c.width)
        self.write = MemoryWrite.from_config(c)
        self.head = nn.Linear(c.width, c.vocabulary)
        self.dropout = nn.Dropout(c.dropout)
        initialise(self, 3 * c.layers)

    def initial_memory(self, batch: int) -> Tensor:
        return self.write.initial_memory(batch)

    def forward(
        self, tokens: Tensor, memory: Tensor | None = None, *, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One segment.

        Args:
            tokens: integer [B, L], L up to `config.segment_length`.
            memory: [B, M, C]; the initial memory by default.
            token_mask: bool [B, L], True where there is a token. Positions count tokens only, so padding may stand
                on either side and in between.

        Returns:
            Logits of the token after each, [B, L, V], and the memory after this segment, [B, M, C].
        """
        if memory is None:
            memory = self.initial_memory(tokens.shape[0])
        x = self._before_memory(tokens, token_mask)
        states = self._with_memory(x, self.projection(memory), token_mask)
        return fused.linear(states, self.head), self.write(memory, states, token_mask=token_mask)

    def loss(self, segment: tuple[Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        """A cell for `memory_replay`: segment = (tokens, targets), both [B, L], to (mean nats a token, next memory).

        A target of -100 does not count. A segment with no target counts as 0.
        """
        return self.cell(segment, memory)

    @property
    def cell(self) -> StagedCell:
        """`loss` in stages: embedding and the first self-attention before the memory, head and loss after it."""
        return StagedCell(self._advance, prepare=self._prepare, readout=self._read_out)

    def _prepare(self, segments: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return side_by_side(self._before_memory, [tokens for tokens, _ in segments])

    def _advance(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        states = self._with_memory(x, self.projection(memory))
        return states, self.write(memory, states)

    def _read_out(self, states: list[Tensor], segments: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        targets = [targets for _, targets in segments]
        losses = side_by_side(lambda s, t: token_losses(fused.linear(s, self.head), t), states, targets)
        return segment_losses(losses, targets)

    def _before_memory(
        self, tokens: Tensor, token_mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Tokens to what the first layer reads the memory with, [B, L, C]."""
        self.check_segment(tokens)
        x = self.dropout(fused.embed(tokens, self.embedding, self.position, positions_of(token_mask, cache)))
        x, branch = self.layers[0].attend_to_itself(x, None, token_mask=token_mask, cache=cache)
        return x + branch

    def _with_memory(
        self,
        x: Tensor,
        slots: list[KeyValue],
        token_mask: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """From there to the final states."""
        x, branch = self.layers[0].read(x, None, *slots[0])
        for i, layer in enumerate(self.layers[1:], 1):
            cache = None if caches is None else caches[i]
            x, branch = layer.attend_to_itself(x, branch, token_mask=token_mask, cache=cache)
            x, branch = layer.read(x, branch, *slots[i])
        return fused.residual_norm(x, branch, self.norm)[1]

    def initial_state(self, batch: int) -> State:
        return {"memory": self.initial_memory(batch)}

    def read_segment(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        logits, memory = self(tokens, state["memory"])
        return logits, {"memory": memory}

    def contexts(self, state: State) -> list[KeyValue]:
        return self.projection(state["memory"])

    def read_open_segment(
        self, tokens: Tensor, contexts: Sequence[KeyValue], caches: Sequence[KeyValueCache]
    ) -> Tensor:
        states = self._with_memory(self._before_memory(tokens, cache=caches[0]), contexts, caches=caches)
        return fused.linear(states, self.head)
