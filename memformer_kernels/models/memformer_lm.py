"""`MemformerLM`: the decoder-only Memformer."""

from torch import Tensor, nn

from memformer_kernels.layers import MemoryLayer, MemoryProjection, MemoryWrite, fused
from memformer_kernels.layers.memory import KeyValue
from memformer_kernels.layers.transformer import KeyValueCache
from memformer_kernels.models.config import MemformerLMConfig
from memformer_kernels.models.initialisation import initialise
from memformer_kernels.models.many_segments import segment_losses, side_by_side, token_losses
from memformer_kernels.models.positions import positions_of
from memformer_kernels.models.pretrained import Pretrained
from memformer_kernels.replay import StagedCell


class MemformerLM(Pretrained):
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
        states = self._states(tokens, memory, token_mask)
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

    def _before_memory(self, tokens: Tensor, token_mask: Tensor | None = None, **cached) -> Tensor:
        """Tokens to what the first layer reads the memory with, [B, L, C]."""
        self.check_segment(tokens, cached.get("position", 0))
        positions = positions_of(tokens, cached.get("position", 0), token_mask)
        x = self.dropout(self.embedding(tokens) + self.position(positions))
        x, branch = self.layers[0].attend_to_itself(x, None, token_mask=token_mask, **cached)
        return x + branch

    def _with_memory(
        self, x: Tensor, slots: list[KeyValue], token_mask: Tensor | None = None, caches=None, position: int = 0
    ) -> Tensor:
        """From there to the final states."""
        x, branch = self.layers[0].read(x, None, slots[0])
        for i, layer in enumerate(self.layers[1:], 1):
            cache = None if caches is None else caches[i]
            x, branch = layer.attend_to_itself(x, branch, token_mask=token_mask, cache=cache, position=position)
            x, branch = layer.read(x, branch, slots[i])
        return fused.residual_norm(x, branch, self.norm)[1]

    def _states(
        self, tokens: Tensor, memory: Tensor, token_mask: Tensor | None = None, decoding: "Decoding | None" = None
    ) -> Tensor:
        if decoding is None:
            return self._with_memory(self._before_memory(tokens, token_mask), self.projection(memory), token_mask)
        position, caches = decoding.position, decoding.caches
        x = self._before_memory(tokens, cache=caches[0], position=position)
        return self._with_memory(x, decoding.slots, caches=caches, position=position)

    def start(self, batch: int, memory: Tensor | None = None) -> "Decoding":
        """An empty segment after `memory`, to be filled token by token with `extend`."""
        return Decoding(self, self.initial_memory(batch) if memory is None else memory)

    def extend(self, tokens: Tensor, decoding: "Decoding") -> Tensor:
        """Appends tokens [B, n] that fit the open segment; logits [B, n, V]. A full segment is written at once."""
        self.check_segment(tokens, decoding.position)
        states = self._states(tokens, decoding.memory, decoding=decoding)
        decoding.append(states, self)
        return self.head(states)


class Decoding:
    """A text being decoded: its memory, and the open segment's caches and states. Constant size at any length."""

    def __init__(self, model: MemformerLM, memory: Tensor):
        self._open(model, memory)

    def _open(self, model: MemformerLM, memory: Tensor) -> None:
        c, batch = model.config, memory.shape[0]
        self.memory, self.position = memory, 0
        self.slots = model.projection(memory)
        like = self.slots[0][0]
        self.caches = [
            KeyValueCache(batch, c.heads, c.segment_length, c.width // c.heads, like) for _ in range(c.layers)
        ]
        self.states = like.new_zeros(batch, c.segment_length, c.width)

    def append(self, states: Tensor, model: MemformerLM) -> None:
        end = self.position + states.shape[1]
        self.states[:, self.position : end] = states
        self.position = end
        if end == model.config.segment_length:
            self._open(model, model.write(self.memory, self.states))
