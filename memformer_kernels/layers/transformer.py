"""Transformer layers with a memory: pre-norm, three sublayers each, as in the paper."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from memformer_kernels.layers import fused
from memformer_kernels.layers.memory import KeyValue, MemoryRead, merge_heads, split_heads


class KeyValueCache:
    """Keys and values that one layer made of the open segment's tokens, in buffers of the segment's length.

    Its tensors keep their addresses, and their shapes do not depend on how full they are: a step that extends it can be
    recorded. `look_from` says where the next tokens stand.
    """

    def __init__(self, batch: int, heads: int, length: int, width: int, like: Tensor):
        self.key = like.new_zeros(batch, heads, length, width)
        self.value = torch.zeros_like(self.key)
        self.place: Tensor | None = None  # [B, n]
        self.visible: Tensor | None = None  # [B, 1, n, length], added to the logits

    def clear(self) -> None:
        self.key.zero_()
        self.value.zero_()

    def extend(self, key: Tensor, value: Tensor) -> KeyValue:
        """Stores those of the next tokens, [B, H, n, D], and returns those of the whole segment."""
        if self.place is None:
            self.key.copy_(key)
            self.value.copy_(value)
            return key, value
        index = self.place[:, None, :, None].expand_as(key)
        return self.key.scatter_(2, index, key), self.value.scatter_(2, index, value)


def look_from(caches: Sequence[KeyValueCache], place: Tensor | None) -> None:
    """The next tokens stand at `place`, integer [B, n], of their segment; None: they are all of it."""
    visible = None
    if place is not None:
        key = caches[0].key
        hidden = torch.arange(key.shape[2], device=key.device) > place[..., None]
        # numbers and not booleans, which attention would turn into numbers in every layer
        visible = torch.zeros(hidden.shape, dtype=key.dtype, device=key.device)
        visible = visible.masked_fill(hidden, float("-inf"))[:, None]
    for cache in caches:
        cache.place, cache.visible = place, visible


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, *, token_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """x [B, L, C] to [B, L, C]. With a cache, x holds the tokens that stand where it looks from."""
        projected = fused.linear(x, self.query_key_value)
        return fused.linear(self.attend(projected, token_mask=token_mask, cache=cache), self.output)

    def attend(self, projected: Tensor, *, token_mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """Between the projections: query, key and value side by side, [B, L, 3 C], to [B, L, C]."""
        dropout = self.dropout if self.training else 0.0
        if cache is None and token_mask is None and not dropout:
            return fused.self_attention(projected, self.heads, causal=self.causal)
        query, key, value = (split_heads(p, self.heads) for p in projected.chunk(3, -1))
        mask = None if token_mask is None else self._mask(token_mask)
        if cache is not None:
            key, value = cache.extend(key, value)
            mask = cache.visible
        causal = self.causal and mask is None
        return merge_heads(
            scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        )

    def _mask(self, token_mask: Tensor) -> Tensor:
        """True where visible, [B, 1, L, L]. A token always sees itself, so that a padded row stays finite."""
        length = token_mask.shape[1]
        mask = token_mask[:, None, None, :].expand(-1, 1, length, length)
        if self.causal:
            mask = mask.tril()
        return mask | torch.eye(length, dtype=torch.bool, device=token_mask.device)


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


RECOMPUTE = ("none", "cheap", "all")


def _recomputed(method: Callable) -> Callable:
    """A part of a layer, of which the graph holds nothing but its inputs where the layer recomputes "all"."""

    @functools.wraps(method)
    def run(self: "Layer", *tensors: object, **options: object) -> tuple[Tensor, Tensor]:
        if self.recompute != "all" or not torch.is_grad_enabled():
            return method(self, *tensors, **options)
        draws = self.training and self.dropout.p > 0
        part = functools.partial(method, self, **options)
        return checkpoint(part, *tensors, use_reentrant=False, preserve_rng_state=draws)

    return run


class Layer(nn.Module):
    """Self-attention, another attention, feed-forward, each normalised before and added after.

    Residual form: what is not yet added goes along as `branch`, so that the next normalisation adds it.

    `recompute`: what the backward computes again. "none": nothing. "cheap": normalisations and GELU, on a GPU; their
    inputs are kept. "all": matrix products too; inputs of a layer's parts are kept.
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
        if recompute not in RECOMPUTE:
            raise ValueError(f"{type(self).__name__}: recompute must be one of {RECOMPUTE}, got {recompute!r}")
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_attention = SelfAttention(width, heads, causal=causal, dropout=dropout)
        for name, module in attention.items():
            self.add_module(name, module)
        self.feed_forward = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.recompute = recompute

    @_recomputed
    def attend_to_itself(
        self,
        x: Tensor,
        branch: Tensor | None,
        *,
        token_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The first sublayer, in residual form: needs nothing but the tokens."""
        x, projected = self._normalised(0, x, branch, self.self_attention.query_key_value)
        attended = self.self_attention.attend(projected, token_mask=token_mask, cache=cache)
        return x, self.dropout(fused.linear(attended, self.self_attention.output))

    def _normalised(self, sublayer: int, x: Tensor, branch: Tensor | None, f: nn.Linear) -> tuple[Tensor, Tensor]:
        return fused.residual_norm_linear(x, branch, self.norms[sublayer], f, recompute=self.recompute)

    def _fed_forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        x, hidden = self._normalised(2, x, branch, self.feed_forward[0])
        return x, self.dropout(fused.gelu_linear(hidden, self.feed_forward[2], recompute=self.recompute))


class MemoryLayer(Layer):
    """Self-attention, memory read, feed-forward: the encoder's layer, and with `causal` the decoder-only model's."""

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

        `tokens`: `token_mask` [B, L] bool, True where there is a token; or a `cache`.
        """
        x, branch = self.read(*self.attend_to_itself(x, None, **tokens), *memory)
        return x + branch

    @_recomputed
    def read(self, x: Tensor, branch: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The second and third sublayer, in residual form."""
        x, query = self._normalised(1, x, branch, self.memory_read.query)
        read = fused.linear(self.memory_read.attend(query, key, value), self.memory_read.output)
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
        return self._attend_to_context(*self.attend_to_itself(x, branch, **tokens), *context, context_mask)

    @_recomputed
    def _attend_to_context(
        self, x: Tensor, branch: Tensor, key: Tensor, value: Tensor, context_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The second and third sublayer, in residual form."""
        if key.shape[2]:
            x, query = self._normalised(1, x, branch, self.cross_attention.query)
            attended = self.cross_attention.attend(query, (key, value), context_mask)
            branch = self.dropout(fused.linear(attended, self.cross_attention.output))
        return self._fed_forward(x, branch)
