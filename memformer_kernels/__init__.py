"""Memformer at speed: memory reading, writing and forgetting, exact memory replay, and the layers and models on top."""

from memformer_kernels.backend import explain
from memformer_kernels.integrations import accelerate, cross_attention, restore
from memformer_kernels.layers import MemoryProjection, MemoryRead, MemoryWrite
from memformer_kernels.models import (
    PRESETS,
    Memformer,
    MemformerConfig,
    MemformerLM,
    MemformerLMConfig,
    Stream,
    generate,
    stream,
)
from memformer_kernels.ops.memory_forget import memory_forget
from memformer_kernels.ops.memory_read import memory_read
from memformer_kernels.ops.memory_write import memory_write
from memformer_kernels.replay import CapturedCell, StagedCell, memory_replay
from memformer_kernels.serving import StreamPool

__all__ = [
    "PRESETS",
    "CapturedCell",
    "Memformer",
    "MemformerConfig",
    "MemformerLM",
    "MemformerLMConfig",
    "MemoryProjection",
    "MemoryRead",
    "MemoryWrite",
    "StagedCell",
    "Stream",
    "StreamPool",
    "accelerate",
    "cross_attention",
    "explain",
    "generate",
    "memory_forget",
    "memory_read",
    "memory_replay",
    "memory_write",
    "restore",
    "stream",
]
