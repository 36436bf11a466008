"""`Memformer`: the encoder-decoder of the paper."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memformer_kernels.layers import DecoderLayer, MemoryLayer, MemoryProjection, MemoryWrite
from memformer_kernels.layers.transformer import KeyValueCache
from memformer_kernels.models.config import MemformerConfig
from memformer_kernels.models.initialisation import initialise
from memformer_kernels.models.positions import positions_of
from memformer_kernels.models.pretrained import Pretrained
from memformer_kernels.ops.precision import wide


class Memformer(Pretrained):
    """The encoder reads segment t with the memory and writes it; the decoder predicts segment t + 1 from its states.

    >>> model = Memformer(MemformerConfig())
    >>> logits, memory = model(segment, next_segment, memory)

    With `model.loss` it is a cell for `memory_replay`.
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
            MemoryLayer(c.width, c.heads, c.hidden, dropout=c.dropout, backend=c.backend)
            for _ in range(c.encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(c.width)
        self.write = MemoryWrite.from_config(c)
        self.decoder = nn.ModuleList(
            DecoderLayer(c.width, c.heads, c.hidden, dropout=c.dropout) for _ in range(c.decoder_layers)
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
        self.check_segment(tokens)
        x = self._embed(tokens, self.encoder_position(positions_of(tokens, token_mask=token_mask)))
        for layer, slots in zip(self.encoder, self.projection(memory), strict=True):
            x = layer(x, slots, token_mask=token_mask)
        states = self.encoder_norm(x)
        return states, self.write(memory, states, token_mask=token_mask)

    def decode(self, tokens: Tensor, states: Tensor, *, states_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, T] and the encoder's states [B, L, C] to logits of the token after each, [B, T, V]. L may be 0."""
        self.check_segment(tokens)
        x = self._embed(tokens, self.decoder_position(positions_of(tokens)))
        for layer in self.decoder:
            x = layer(x, layer.cross_attention.project(states), context_mask=states_mask)
        return self.head(self.norm(x))

    def loss(self, segment: tuple[Tensor, Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        """A cell for `memory_replay`: segment = (source [B, L], target [B, T], labels [B, T]) to (mean nats a
        token, next memory).

        A label of -100 does not count. A segment with no label counts as 0.
        """
        source, target, labels = segment
        logits, memory = self(source, target, memory)
        total = cross_entropy(wide(logits.flatten(0, 1)), labels.flatten(), ignore_index=-100, reduction="sum")
        return total / (labels != -100).sum().clamp(min=1), memory

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens) + positions)

    def start(self, batch: int, memory: Tensor | None = None) -> "Decoding":
        """The beginning of a text after `memory`, to be filled with `extend`."""
        return Decoding(self, self.initial_memory(batch) if memory is None else memory)

    def extend(self, tokens: Tensor, decoding: "Decoding") -> Tensor:
        """Appends tokens [B, n] that fit the open segment; logits [B, n, V] of the token after each.

        A full segment is encoded and written at once, and the next is decoded from its states.
        """
        self.check_segment(tokens, decoding.position)
        x = self._embed(tokens, self.decoder_position(positions_of(tokens, decoding.position)))
        for layer, context, cache in zip(self.decoder, decoding.contexts, decoding.caches, strict=True):
            x = layer(x, context, cache=cache, position=decoding.position)
        decoding.append(tokens, self)
        return self.head(self.norm(x))


class Decoding:
    """A text being decoded: its memory, the states of the last full segment, the open segment and its caches."""

    def __init__(self, model: Memformer, memory: Tensor):
        nothing = memory.new_zeros(memory.shape[0], 0, memory.shape[2])
        self._open(model, memory, nothing)

    def _open(self, model: Memformer, memory: Tensor, states: Tensor) -> None:
        c, batch = model.config, memory.shape[0]
        self.memory, self.position = memory, 0
        self.contexts = [layer.cross_attention.project(states) for layer in model.decoder]
        like = self.contexts[0][0]
        self.caches = [
            KeyValueCache(batch, c.heads, c.segment_length, c.width // c.heads, like) for _ in range(c.decoder_layers)
        ]
        self.tokens = torch.zeros(batch, c.segment_length, dtype=torch.long, device=memory.device)

    def append(self, tokens: Tensor, model: Memformer) -> None:
        end = self.position + tokens.shape[1]
        self.tokens[:, self.position : end] = tokens
        self.position = end
        if end == model.config.segment_length:
            states, memory = model.encode(self.tokens, self.memory)
            self._open(model, memory, states)
