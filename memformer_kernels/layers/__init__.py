"""Layers: parameters and projections round the ops."""

from memformer_kernels.layers.memory import MemoryProjection, MemoryRead, MemoryWrite
from memformer_kernels.layers.transformer import CrossAttention, DecoderLayer, FeedForward, MemoryLayer, SelfAttention

__all__ = [
    "CrossAttention",
    "DecoderLayer",
    "FeedForward",
    "MemoryLayer",
    "MemoryProjection",
    "MemoryRead",
    "MemoryWrite",
    "SelfAttention",
]
