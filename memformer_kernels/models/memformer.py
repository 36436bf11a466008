"""`Memformer`: the encoder-decoder of the paper."""

from collections.abc import Sequence

from torch import Tensor, nn

from memformer_kernels.layers import DecoderLayer, MemoryLayer, MemoryProjection, MemoryWrite, fused
from memformer_kernels.layers.memory import KeyValue
from memformer_kernels.layers.transformer import KeyValueCache
from memformer_kernels.models.config import MemformerConfig
from memformer_kernels.models.initialisation import initialise
from memformer_kernels.models.many_segments import segment_losses, side_by_side, token_losses
from memformer_kernels.models.positions import positions_of
from memformer_kernels.models.recurrent import Recurrent, State
from memformer_kernels.replay import StagedCell


class Memformer(Recurrent):
    """The encoder reads segment t with the memory and writes it; the decoder predicts segment t + 1 from its states.

    >>> model = Memformer(MemformerConfig())
    >>> logits, memory = model(segment, next_segment, memory)

    `model.cell` is a cell for `memory_replay`.
    """

    config_class = MemformerConfig

    def __init__(self, config: MemformerConfig):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.encoder_position = nn.Embedding(c.segment_length, c.width)
        self.decoder_position = nn.Embedding(c.segment_length, c.width)
        self.projection = MemoryProjection(c.width, c.heads, c.encoder_layers)
        self.encoder = nn.ModuleList(
            MemoryLayer(c.width, c.heads, c.hidden, dropout=c.dropout, recompute=c.recompute, backend=c.backend)
            for _ in range(c.encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(c.width)
        self.write = MemoryWrite.from_config(c)
        self.decoder = nn.ModuleList(
            DecoderLayer(c.width, c.heads, c.hidden, dropout=c.dropout, recompute=c.recompute)
            for _ in range(c.decoder_layers)
        )
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.vocabulary)
        self.dropout = nn.Dropout(c.dropout)
        initialise(self, 3 * max(c.encoder_layers, c.decoder_layers))

    def initial_memory(self, batch: int) -> Tensor:
        return self.write.initial_memory(batch)

    def forward(
        self, source: Tensor, target: Tensor, memory: Tensor | None = None, *, source_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One segment.

        Args:
            source: integer [B, L], segment t.
            target: integer [B, T], segment t + 1, of which each token predicts the one after it.
            memory: [B, M, C]; the initial memory by default.
            source_mask: bool [B, L], True where there is a token. Positions count tokens only.

        Returns:
            Logits of the token after each of segment t + 1, [B, T, V], and the memory after segment t, [B, M, C].
        """
        if memory is None:
            memory = self.initial_memory(source.shape[0])
        states, memory = self.encode(source, memory, token_mask=source_mask)
        return self.decode(target, states, states_mask=source_mask), memory

    def encode(self, tokens: Tensor, memory: Tensor, *, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] and the memory [B, M, C] to the encoder's states [B, L, C] and the next memory."""
        return self._advance(self._before_memory(tokens, token_mask), memory, token_mask)

    def decode(self, tokens: Tensor, states: Tensor, *, states_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, T] and the encoder's states [B, L, C] to logits of the token after each, [B, T, V]. L may be 0."""
        self.check_segment(tokens)
        x, branch = self._embed(tokens, self.decoder_position), None
        for layer in self.decoder:
            x, branch = layer.decode(x, branch, layer.cross_attention.project(states), context_mask=states_mask)
        return self._logits(x, branch)

    def loss(self, segment: tuple[Tensor, Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        """A cell for `memory_replay`: segment = (source [B, L], target [B, T], labels [B, T]) to (mean nats a
        token, next memory).

        A label of -100 does not count. A segment with no label counts as 0.
        """
        return self.cell(segment, memory)

    @property
    def cell(self) -> StagedCell:
        """`loss` in stages: only the encoder, but for its first self-attention, runs segment after segment."""
        return StagedCell(self._advance, prepare=self._prepare, readout=self._read_out)

    def _prepare(self, segments: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        return side_by_side(self._before_memory, [source for source, _, _ in segments])

    def _advance(self, x: Tensor, memory: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        branch = None
        for i, (layer, slots) in enumerate(zip(self.encoder, self.projection(memory), strict=True)):
            if i > 0:
                x, branch = layer.attend_to_itself(x, branch, token_mask=token_mask)
            x, branch = layer.read(x, branch, *slots)
        states = fused.residual_norm(x, branch, self.encoder_norm)[1]
        return states, self.write(memory, states, token_mask=token_mask)

    def _read_out(self, states: list[Tensor], segments: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        targets, labels = ([segment[i] for segment in segments] for i in (1, 2))
        losses = side_by_side(lambda s, t, y: token_losses(self.decode(t, s), y), states, targets, labels)
        return segment_losses(losses, labels)

    def _before_memory(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Tokens to what the first encoder layer reads the memory with, [B, L, C]."""
        self.check_segment(tokens)
        x = self._embed(tokens, self.encoder_position, positions_of(token_mask))
        x, branch = self.encoder[0].attend_to_itself(x, None, token_mask=token_mask)
        return x + branch

    def _embed(self, tokens: Tensor, position: nn.Embedding, positions: Tensor | None = None) -> Tensor:
        return self.dropout(fused.embed(tokens, self.embedding, position, positions))

    def _logits(self, x: Tensor, branch: Tensor | None) -> Tensor:
        return fused.residual_norm_linear(x, branch, self.norm, self.head)[1]

    def initial_state(self, batch: int) -> State:
        # keys and values are projected without a bias: attention to states of zeros adds nothing, as to none at all
        memory, c = self.initial_memory(batch), self.config
        return {"memory": memory, "states": memory.new_zeros(batch, c.segment_length, c.width)}

    def read_segment(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        states, memory = self.encode(tokens, state["memory"])
        return self.decode(tokens, state["states"]), {"memory": memory, "states": states}

    def contexts(self, state: State) -> list[KeyValue]:
        return [layer.cross_attention.project(state["states"]) for layer in self.decoder]

    def read_open_segment(
        self, tokens: Tensor, contexts: Sequence[KeyValue], caches: Sequence[KeyValueCache]
    ) -> Tensor:
        x, branch = self._embed(tokens, self.decoder_position, positions_of(cache=caches[0])), None
        for layer, context, cache in zip(self.decoder, contexts, caches, strict=True):
            x, branch = layer.decode(x, branch, context, context_mask=None, cache=cache)
        return self._logits(x, branch)
