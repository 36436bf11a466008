"""Whole models."""

from memformer_kernels.models.config import PRESETS, MemformerConfig, MemformerLMConfig
from memformer_kernels.models.generation import generate
from memformer_kernels.models.memformer import Memformer
from memformer_kernels.models.memformer_lm import MemformerLM
from memformer_kernels.models.streaming import Stream, stream

__all__ = [
    "PRESETS",
    "Memformer",
    "MemformerConfig",
    "MemformerLM",
    "MemformerLMConfig",
    "Stream",
    "generate",
    "stream",
]
