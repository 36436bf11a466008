"""The PyPI package `memformer` 0.3.1: its modules, and memory replay of its models."""

from memformer_kernels.integrations.memformer.replay import memory_replay_backprop, segment_cell

__all__ = ["memory_replay_backprop", "segment_cell"]
