"""`MemformerLM`: the decoder-only Memformer."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memformer_kernels.layers import MemoryLayer, MemoryProjection, MemoryWrite
from memformer_kernels.layers.transformer import KeyValueCache
from memformer_kernels.models.config import MemformerLMConfig
from memformer_kernels.models.initialisation import initialise
from memformer_kernels.models.positions import positions_of
from memformer_kernels.models.pretrained import Pretrained
from memformer_kernels.ops.precision import wide


class MemformerLM(Pretrained):
    """Reads a text segment by segment: each token sees its segment, and the slots that all segments before wrote.

    >>> model = MemformerLM(MemformerLMConfig())
    >>> logits, memory = model(tokens)                 # [B, L] -> [B, L, V], [B, M, C]
    >>> logits, memory = model(next_tokens, memory)

    With `model.loss` it is a cell for `memory_replay`.
    """

    config_class = MemformerLMConfig

    def __init__(self, config: MemformerLMConfig):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.position = nn.Embedding(c.segment_length, c.width)
        self.projection = MemoryProjection(c.width, c.heads, c.layers)
        self.layers = nn.ModuleList(
            MemoryLayer(c.width, c.heads, c.hidden, causal=True, dropout=c.dropout, backend=c.backend)
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
        self.check_segment(tokens)
        if memory is None:
            memory = self.initial_memory(tokens.shape[0])
        states = self._states(tokens, memory, token_mask)
        return self.head(states), self.write(memory, states, token_mask=token_mask)

    def loss(self, segment: tuple[Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        """A cell for `memory_replay`: segment = (tokens, targets), both [B, L], to (mean nats a token, next memory).

        A target of -100 does not count. A segment with no target counts as 0.
        """
        tokens, targets = segment
        logits, memory = self(tokens, memory)
        total = cross_entropy(wide(logits.flatten(0, 1)), targets.flatten(), ignore_index=-100, reduction="sum")
        return total / (targets != -100).sum().clamp(min=1), memory

    def _states(
        self, tokens: Tensor, memory: Tensor, token_mask: Tensor | None = None, decoding: "Decoding | None" = None
    ) -> Tensor:
        start = 0 if decoding is None else decoding.position
        x = self.dropout(self.embedding(tokens) + self.position(positions_of(tokens, start, token_mask)))
        slots = self.projection(memory) if decoding is None else decoding.slots
        caches = [None] * len(self.layers) if decoding is None else decoding.caches
        for layer, layer_slots, cache in zip(self.layers, slots, caches, strict=True):
            x = layer(x, layer_slots, token_mask=token_mask, cache=cache, position=start)
        return self.norm(x)

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
