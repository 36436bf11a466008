"""Memory-replay back-propagation over any segment cell."""

from memformer_kernels.replay.api import memory_replay

__all__ = ["memory_replay"]
