"""Transformer layers with a memory: pre-norm, three sublayers each, as in the paper."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from memformer_kernels.layers import fused
from memformer_kernels.layers.memory import KeyValue, MemoryRead, merge_heads, split_heads


class KeyValueCache:
    """Keys and values of the tokens of one segment decoded so far, in buffers of the segment's length."""

    def __init__(self, batch: int, heads: int, length: int, width: int, like: Tensor):
        self.key = like.new_zeros(batch, heads, length, width)
        self.value = torch.zeros_like(self.key)

    def extend(self, key: Tensor, value: Tensor, position: int) -> KeyValue:
        """Stores those of the tokens from `position` on, returns those of all tokens up to the last of them."""
        end = position + key.shape[2]
        self.key[:, :, position:end], self.value[:, :, position:end] = key, value
        return self.key[:, :, :end], self.value[:, :, :end]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, *, token_mask: Tensor | None = None, cache: KeyValueCache | None = None, position: int = 0
    ) -> Tensor:
        """x [B, L, C] to [B, L, C]. With a cache, x holds the tokens of the segment from `position` on."""
        projected = fused.linear(x, self.query_key_value)
        attended = self.attend(projected, token_mask=token_mask, cache=cache, position=position)
        return fused.linear(attended, self.output)

    def attend(
        self, projected: Tensor, *, token_mask: Tensor | None, cache: KeyValueCache | None, position: int
    ) -> Tensor:
        """Between the projections: query, key and value side by side, [B, L, 3 C], to [B, L, C]."""
        dropout = self.dropout if self.training else 0.0
        if cache is None and token_mask is None and not dropout:
            return fused.self_attention(projected, self.heads, causal=self.causal)
        query, key, value = (split_heads(p, self.heads) for p in projected.chunk(3, -1))
        if cache is not None:
            key, value = cache.extend(key, value, position)
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self._mask(query, key, token_mask),
            dropout_p=dropout,
            is_causal=self.causal and token_mask is None and query.shape[2] == key.shape[2],
        )
        return merge_heads(output)

    def _mask(self, query: Tensor, key: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """True where visible, or None where `is_causal` or nothing at all says it."""
        length, total = query.shape[2], key.shape[2]
        mask = None
        if self.causal and (token_mask is not None or 1 < length < total):
            mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
        if token_mask is not None:
            # a token always sees itself, so that a padded row stays finite
            own = torch.eye(length, total, dtype=torch.bool, device=query.device)
            mask = (token_mask[:, None, None, :] if mask is None else mask & token_mask[:, None, None, :]) | own
        return mask


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def project(self, context: Tensor) -> KeyValue:
        """Keys and values of a context [B, L, C], once for all tokens that attend to it."""
        key, value = fused.linear(context, self.key_value).chunk(2, -1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, x: Tensor, context: KeyValue, *, context_mask: Tensor | None = None) -> Tensor:
        return fused.linear(self.attend(fused.linear(x, self.query), context, context_mask), self.output)

    def attend(self, query: Tensor, context: KeyValue, context_mask: Tensor | None) -> Tensor:
        """Between the projections: query [B, L, C], to [B, L, C]."""
        query = split_heads(query, self.heads)
        mask = None if context_mask is None else context_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        return merge_heads(scaled_dot_product_attention(query, *context, attn_mask=mask, dropout_p=dropout))


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Layer(nn.Module):
    """Self-attention, another attention, feed-forward, each normalised before and added after.

    Residual form: what is not yet added goes along as `branch`, so that the next normalisation adds it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        causal: bool,
        dropout: float,
        recompute: str,
        **attention: nn.Module,
    ):
        super().__init__()
        if recompute not in ("cheap", "none"):
            raise ValueError(f"{type(self).__name__}: recompute must be 'cheap' or 'none', got {recompute!r}")
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_attention = SelfAttention(width, heads, causal=causal, dropout=dropout)
        for name, module in attention.items():
            self.add_module(name, module)
        self.feed_forward = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.recompute = recompute

    def attend_to_itself(
        self,
        x: Tensor,
        branch: Tensor | None,
        *,
        token_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        position: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The first sublayer, in residual form: needs nothing but the tokens."""
        x, projected = self._normalised(0, x, branch, self.self_attention.query_key_value)
        attended = self.self_attention.attend(projected, token_mask=token_mask, cache=cache, position=position)
        return x, self.dropout(fused.linear(attended, self.self_attention.output))

    def _normalised(self, sublayer: int, x: Tensor, branch: Tensor | None, f: nn.Linear) -> tuple[Tensor, Tensor]:
        return fused.residual_norm_linear(x, branch, self.norms[sublayer], f, recompute=self.recompute)

    def _fed_forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        x, hidden = self._normalised(2, x, branch, self.feed_forward[0])
        return x, self.dropout(fused.gelu_linear(hidden, self.feed_forward[2], recompute=self.recompute))


class MemoryLayer(Layer):
    """Self-attention, memory read, feed-forward: the encoder's layer, and with `causal` the decoder-only model's.

    `recompute`: what the backward computes again on a GPU, "cheap" (normalisations and GELU) or "none".
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        causal: bool = False,
        dropout: float = 0.0,
        recompute: str = "cheap",
        backend: str = "auto",
    ):
        memory_read = MemoryRead(width, heads, projection=False, backend=backend)
        options = dict(causal=causal, dropout=dropout, recompute=recompute)
        super().__init__(width, heads, hidden, **options, memory_read=memory_read)

    def forward(self, x: Tensor, memory: KeyValue, **tokens: object) -> Tensor:
        """x [B, L, C], this layer's memory (key, value) [B, H, M, D] each, to [B, L, C].

        `tokens`: `token_mask` [B, L] bool, True where there is a token; or a `cache` and the `position` that x is from.
        """
        x, branch = self.read(*self.attend_to_itself(x, None, **tokens), memory)
        return x + branch

    def read(self, x: Tensor, branch: Tensor | None, memory: KeyValue) -> tuple[Tensor, Tensor]:
        """The second and third sublayer, in residual form."""
        x, query = self._normalised(1, x, branch, self.memory_read.query)
        read = fused.linear(self.memory_read.attend(query, *memory), self.memory_read.output)
        return self._fed_forward(x, self.dropout(read))


class DecoderLayer(Layer):
    """Causal self-attention, cross-attention to the encoder's states, feed-forward. It never sees the slots."""

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float = 0.0, recompute: str = "cheap"):
        cross_attention = CrossAttention(width, heads, dropout=dropout)
        options = dict(causal=True, dropout=dropout, recompute=recompute)
        super().__init__(width, heads, hidden, **options, cross_attention=cross_attention)

    def forward(self, x: Tensor, context: KeyValue, *, context_mask: Tensor | None = None, **tokens: object) -> Tensor:
        """x [B, L, C], (key, value) of the encoder's states [B, H, L', D] each, to [B, L, C]; `tokens` as above."""
        x, branch = self.decode(x, None, context, context_mask=context_mask, **tokens)
        return x + branch

    def decode(
        self, x: Tensor, branch: Tensor | None, context: KeyValue, *, context_mask: Tensor | None, **tokens: object
    ) -> tuple[Tensor, Tensor]:
        """All sublayers, in residual form."""
        x, branch = self.attend_to_itself(x, branch, **tokens)
        if context[0].shape[2]:
            x, query = self._normalised(1, x, branch, self.cross_attention.query)
            attended = self.cross_attention.attend(query, context, context_mask)
            branch = self.dropout(fused.linear(attended, self.cross_attention.output))
        return self._fed_forward(x, branch)
