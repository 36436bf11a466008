"""Transformer layers with a memory: pre-norm, three sublayers each, as in the paper."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

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
        query, key, value = (split_heads(p, self.heads) for p in self.query_key_value(x).chunk(3, -1))
        if cache is not None:
            key, value = cache.extend(key, value, position)
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self._mask(query, key, token_mask),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and token_mask is None and query.shape[2] == key.shape[2],
        )
        return self.output(merge_heads(output))

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
        key, value = self.key_value(context).chunk(2, -1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, x: Tensor, context: KeyValue, *, context_mask: Tensor | None = None) -> Tensor:
        query = split_heads(self.query(x), self.heads)
        mask = None if context_mask is None else context_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        return self.output(
            merge_heads(scaled_dot_product_attention(query, *context, attn_mask=mask, dropout_p=dropout))
        )


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MemoryLayer(nn.Module):
    """Self-attention, memory read, feed-forward: the encoder's layer, and with `causal` the decoder-only model's."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, causal: bool = False, dropout: float = 0.0, backend: str = "auto"
    ):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_attention = SelfAttention(width, heads, causal=causal, dropout=dropout)
        self.memory_read = MemoryRead(width, heads, projection=False, backend=backend)
        self.feed_forward = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: KeyValue,
        *,
        token_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        position: int = 0,
    ) -> Tensor:
        """x [B, L, C], this layer's memory (key, value) [B, H, M, D] each, to [B, L, C]."""
        attended = self.self_attention(self.norms[0](x), token_mask=token_mask, cache=cache, position=position)
        x = x + self.dropout(attended)
        x = x + self.dropout(self.memory_read(self.norms[1](x), memory))
        return x + self.dropout(self.feed_forward(self.norms[2](x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the encoder's states, feed-forward. It never sees the slots."""

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float = 0.0):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_attention = SelfAttention(width, heads, causal=True, dropout=dropout)
        self.cross_attention = CrossAttention(width, heads, dropout=dropout)
        self.feed_forward = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        context: KeyValue,
        *,
        context_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        position: int = 0,
    ) -> Tensor:
        """x [B, L, C], (key, value) of the encoder's states [B, H, L', D] each, to [B, L, C]."""
        attended = self.self_attention(self.norms[0](x), cache=cache, position=position)
        x = x + self.dropout(attended)
        if context[0].shape[2]:
            x = x + self.dropout(self.cross_attention(self.norms[1](x), context, context_mask=context_mask))
        return x + self.dropout(self.feed_forward(self.norms[2](x)))
