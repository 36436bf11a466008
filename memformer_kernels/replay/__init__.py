"""Memory-replay back-propagation over any segment cell."""

from memformer_kernels.replay.api import memory_replay
from memformer_kernels.replay.captured import CapturedCell
from memformer_kernels.replay.stages import StagedCell

__all__ = ["CapturedCell", "StagedCell", "memory_replay"]
